"""Write files and folders atomically: to a hidden temporary path next to the target, which is then renamed.

So a file is complete even if the process is killed, and a `durable` one even if the machine crashes.

`write` writes the bytes of a file; `atomic_write` yields a path for whatever else writes. Both refuse a folder that was
moved meanwhile (`dumo.io.guard`). Code that cannot write inside a `with` block uses `temp_path_for` and `commit`.
`is_disk_full` recognizes the error of a full disk. `named_in_errors` adds the path of an unreadable file to errors.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from dumo.io.guard import require_in_place

_DISK_FULL_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_PRIVATE_MODE = 0o600  # of files that safetensors makes


@contextmanager
def atomic_write(path: Path, *, writer: int | str | None = None, durable: bool = False) -> Generator[Path, None, None]:
    """Yield a temporary path for a file or a folder. It is renamed to `path` at the end, and removed after an error.

    `writer` identifies one of several concurrent writers of this path; None means a random name.
    `durable`: wait for the disk. Raises OSError for a full disk, whoever wrote; what `path` was before then stays.
    """
    temp_path = temp_path_for(path, secrets.token_hex(4) if writer is None else writer)
    require_in_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temp_path
        commit(temp_path, path, durable=durable)
    except BaseException as error:
        remove(temp_path)
        # The error of safetensors is no OSError, and the system's own may name no file.
        if is_disk_full(error):
            number = getattr(error, "errno", None) or errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextmanager
def named_in_errors(path: Path | str) -> Generator[None, None, None]:
    """Name a file in an OSError of what is read inside: the system names only a file that it cannot open."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot be read ({error.strerror})", str(path)) from error


def commit(temp_path: Path, path: Path, *, durable: bool = False) -> None:
    """Rename `temp_path` to `path`, replacing what is there. If `durable`, flush it to disk first.

    Applies the umask to files of safetensors, which are created private. Raises IsADirectoryError if a file would
    replace a folder.
    """
    for part in (*temp_path.rglob("*"), temp_path):
        if part.stat().st_mode & 0o777 == _PRIVATE_MODE:
            part.chmod(0o666 & ~_umask())
        if durable:
            flush(part)
    # A rename replaces a file, but only an empty folder.
    if path.is_dir() and temp_path.is_dir():
        remove(path)
    temp_path.replace(path)
    if durable:
        flush(path.parent)


def write(path: Path, data: bytes, *, writer: int | str | None = None, durable: bool = False) -> None:
    """Write a file whole or not at all, by `atomic_write`. Raises OSError."""
    with atomic_write(path, writer=writer, durable=durable) as temp_path:
        temp_path.write_bytes(data)


def temp_path_for(path: Path, writer: int | str = "") -> Path:
    """Return the hidden temporary path of a file or folder. `writer` is "" if there is one writer at a time."""
    if writer == "":
        return path.with_name(f".{path.name}.tmp")
    return path.with_name(f".{path.name}.{writer}.tmp")


def remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link but not its target; a missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk, the quota or the file size limit is exhausted."""
    from safetensors import SafetensorError  # imported only if needed

    if isinstance(error, SafetensorError):  # has the number of the system's error in its text alone
        match = re.search(r"os error (\d+)", str(error))
        return match is not None and int(match[1]) in _DISK_FULL_ERRORS
    return isinstance(error, OSError) and error.errno in _DISK_FULL_ERRORS


def _umask() -> int:
    """Return the umask."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask
