"""Files and folders written whole or not at all: in a hidden place beside their own, then renamed.

So what stands under a name is whole, whenever the process stops. What is `durable` outlives the machine, too.
`locked` keeps other processes out.
"""

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from dumo.types import UserError

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def whole(path: Path, *, writer: int | str | None = None, durable: bool = False) -> Generator[Path, None, None]:
    """Yield a hidden place for a file or a folder, which becomes `path` when all went well, and is removed when not.

    `writer` tells apart those who may write this path at once; None: this process. `durable`: wait for the disk. An
    OSError (a full disk, a forbidden folder) passes through; what stood at `path` before then still stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = hidden(path, os.getpid() if writer is None else writer)
    try:
        yield half
        settle(half, path, durable=durable)
    except BaseException:
        remove(half)
        raise


def settle(half: Path, path: Path, *, durable: bool = False) -> None:
    """Give what was written at `half` its name; a folder that stands there goes. `durable`: once it is on the disk."""
    if durable:
        for part in (*half.rglob("*"), half):
            flush(part)
    if path.is_dir():
        shutil.rmtree(path.rename(hidden(path, "old")))  # a folder takes the place of an empty one only
    half.replace(path)
    if durable:
        flush(path.parent)


def write(path: Path, data: bytes, *, writer: int | str | None = None, durable: bool = False) -> None:
    """Write a file as `whole` does."""
    with whole(path, writer=writer, durable=durable) as half:
        half.write_bytes(data)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Generator[None, None, None]:
    """Hold the lock file `path`, one process at a time; the file is removed at the end.

    The operating system keeps the lock, so a killed process lets go of it. While another holds it: UserError with the
    words `busy`; None: wait.
    """
    lock = FileLock(path, timeout=-1 if busy is None else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{busy} ({path} is locked)") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone, and makes it again
        lock.release()


def hidden(path: Path, writer: int | str = "") -> Path:
    """Where a file or folder lies while it is being written, or removed; '': there is one writer at a time."""
    return path.with_name(f".{path.name}.{writer}.tmp" if writer != "" else f".{path.name}.tmp")


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file, as far as it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def free(path: Path) -> int:
    """Bytes that may still be written where a file or folder lies, or will."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def full(error: BaseException) -> bool:
    """Whether an error says that the disk, the quota or the limit on a file's size is used up."""
    if isinstance(error, SafetensorError):  # carries the number of the system's error as text only
        match = re.search(r"os error (\d+)", str(error))
        return match is not None and int(match[1]) in FULL
    return isinstance(error, OSError) and error.errno in FULL
