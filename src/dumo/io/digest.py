"""SHA-256 of files, numbers and texts, in hexadecimal."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def of_file(file: Path) -> str:
    """Of a file's bytes; of a folder of shards, those of the one file that one process would have written."""
    if file.is_dir():
        from dumo.io import shards  # slow to import

        found = hashlib.sha256()
        for part in shards.as_file(file):
            found.update(part)
        return found.hexdigest()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def of_tensor(x: Tensor) -> str:
    """Of a tensor's shape, type and numbers."""
    return of_bytes(f"{tuple(x.shape)} {x.dtype}".encode(), x.detach().cpu().contiguous().numpy().data)


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors by their names: the first 64 bits."""
    return short(*(text for name in sorted(tensors) for text in (name, of_tensor(tensors[name]))))


def short(*parts: str) -> str:
    """Of some texts, in their order, each with its length before it: the first 64 bits."""
    texts = [part.encode("utf-8", "surrogatepass") for part in parts]
    return of_bytes(*(b"%d:%b" % (len(text), text) for text in texts))[:16]


def of_bytes(*parts: bytes | memoryview) -> str:
    """Of all parts, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()
