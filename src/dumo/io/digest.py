"""SHA-256 of files, tensors and texts, in hexadecimal. Callers write `digest.of_file(file)`.

- `of_file`, `of_bytes` and `of_stream` give the digest that other programs compute.
- `of_tensor` and, for large tensors, `of_samples` include names, shapes and dtypes.
- `short`, for texts, and `of_tensors` return 64 bits.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NUM_SAMPLES = 64  # values of each tensor in `of_samples`


def of_file(file: Path) -> str:
    """Return the digest of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def of_tensor(x: Tensor) -> str:
    """Return the digest of a tensor's shape, dtype and values."""
    header = f"{tuple(x.shape)} {x.dtype}"
    values = x.detach().cpu().flatten().view(torch.uint8)  # bytes, for NumPy has no bfloat16
    return of_bytes(header.encode(), values.numpy().data)


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of tensors with their names: the first 64 bits."""
    texts: list[str] = []
    for name in sorted(tensors):
        texts += [name, of_tensor(tensors[name])]
    return short(*texts)


def of_samples(tensors: Mapping[str, Tensor], loaders: Mapping[str, Callable[[], Tensor]] | None = None) -> str:
    """Return the digest of the names, shapes, dtypes and some evenly spaced values of large tensors.

    `loaders` returns, by name, the values of tensors that are on the meta device.
    """
    loaders = loaders or {}
    parts: list[bytes] = []
    for name, x in sorted(tensors.items()):
        # The values are in no variable, so that only one tensor at a time is in memory.
        parts += _header_and_samples(name, loaders[name]() if name in loaders else x.detach())
    return of_bytes(*parts)


def _header_and_samples(name: str, x: Tensor) -> tuple[bytes, bytes]:
    """Return the bytes of a tensor that go into the digest: name, shape and dtype; then some of its values."""
    count = min(_NUM_SAMPLES, x.numel())
    places = torch.arange(count, device=x.device) * x.numel() // max(count, 1)
    samples = x.flatten()[places].cpu()
    header = f"{name} {tuple(x.shape)} {x.dtype}\n"
    return header.encode(), bytes(samples.view(torch.uint8).numpy().data)


def short(*parts: str) -> str:
    """Return the digest of texts, in their order, each with its length before it: the first 64 bits."""
    texts = [part.encode("utf-8", "surrogatepass") for part in parts]
    return of_bytes(*(b"%d:%b" % (len(text), text) for text in texts))[:16]


def of_bytes(*parts: bytes | memoryview) -> str:
    """Return the digest of the concatenated parts."""
    return of_stream(parts)


def of_stream(parts: Iterable[bytes | memoryview]) -> str:
    """Return the digest of concatenated parts, which are freed one by one."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()
