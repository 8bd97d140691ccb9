"""SHA-256 of files, numbers and texts, in hexadecimal."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

SAMPLE = 64  # numbers of each tensor in the digest: ours


def of_file(file: Path) -> str:
    """Of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def of_tensor(x: Tensor) -> str:
    """Of a tensor's shape, type and numbers."""
    return of_bytes(f"{tuple(x.shape)} {x.dtype}".encode(), x.detach().cpu().contiguous().numpy().data)


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors by their names: the first 64 bits."""
    return short(*(text for name in sorted(tensors) for text in (name, of_tensor(tensors[name]))))


def of_samples(tensors: Mapping[str, Tensor], made: Callable[[Tensor], Tensor] = torch.detach) -> str:
    """Of large tensors by their names: of each the shape, the type and up to SAMPLE of its numbers, evenly spread.

    `made` returns the numbers of one that is not made yet.
    """
    return of_bytes(*(part for name, x in sorted(tensors.items()) for part in _sampled(name, made(x))))


def _sampled(name: str, x: Tensor) -> tuple[bytes, bytes]:
    """The bytes of a tensor that go into the digest."""
    count = min(SAMPLE, x.numel())
    some = x.flatten()[torch.arange(count, device=x.device) * x.numel() // max(count, 1)].cpu()
    return f"{name} {tuple(x.shape)} {x.dtype}\n".encode(), bytes(some.view(torch.uint8).numpy().data)


def short(*parts: str) -> str:
    """Of some texts, in their order, each with its length before it: the first 64 bits."""
    texts = [part.encode("utf-8", "surrogatepass") for part in parts]
    return of_bytes(*(b"%d:%b" % (len(text), text) for text in texts))[:16]


def of_bytes(*parts: bytes | memoryview) -> str:
    """Of all parts, one after the other."""
    return of_stream(parts)


def of_stream(parts: Iterable[bytes | memoryview]) -> str:
    """Of parts that come one after the other, each held no longer than it takes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
