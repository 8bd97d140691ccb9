"""Files and folders written whole or not at all: under a hidden temporary name next to their own, then renamed.

So a file that has its name is whole, whenever the process stops. A `durable` one outlives a crash of the machine, too.

The order of events of a write:

1. `check_writable` and `free_bytes` ask whether it can be written. `sweep` removes what killed writers left, and puts
   back what they had put aside.
2. `write` writes the bytes of a file; `atomic_write` yields a path for whatever else writes. Both refuse a folder that
   was moved meanwhile (`dumo.io.guard`). Code that writes longer than a `with` can last takes `temp_path_for` and, at
   the end, `commit`.
3. Where that fails, `is_disk_full` knows the error of a full disk.

`remove`, `flush` and `machine_id` are small steps that others share.
"""

import errno
import glob
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from dumo.io.guard import require_in_place

_DISK_FULL_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_PRIVATE_MODE = 0o600  # of files that safetensors makes
_ABANDONED_SECONDS = 86_400.0  # a day, after which another machine's temporary file is swept: ours
_REPLACED_WRITER = "old"  # in place of a writer's id, in the name of a folder that is being replaced
_being_written: set[Path] = set()  # temporary paths that threads of this process are writing now
_TEMP_NAME = re.compile(
    rf"\.(?P<name>.+)\.(?:(?P<machine>[0-9a-f]{{8}})-(?P<process>\d+)|(?P<replaced>{_REPLACED_WRITER}))\.tmp"
)


@contextmanager
def atomic_write(path: Path, *, writer: int | str | None = None, durable: bool = False) -> Generator[Path, None, None]:
    """Yield a temporary path for a file or a folder. It is renamed to `path` at the end, and removed after an error.

    `writer` is different for each that may write this path at once; None: this process. `durable`: wait for the disk.
    Raises OSError, which names `path`, for a full disk or a forbidden folder; what `path` was before then stays.
    """
    if writer is None:
        writer = f"{machine_id()}-{os.getpid()}"  # among writers from any machine
    temp_path = temp_path_for(path, writer)
    _being_written.add(temp_path.absolute())
    try:
        require_in_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp_path
        commit(temp_path, path, durable=durable)
    except BaseException as error:
        remove(temp_path)
        error_of_path = _error_of(path, error, temp_path)
        if error_of_path:
            raise error_of_path from error
        raise
    finally:
        _being_written.discard(temp_path.absolute())


def _error_of(path: Path, error: BaseException, temp_path: Path) -> OSError | None:
    """The error in writing `temp_path`, as one of `path`; None where it names `path` already, or is of another kind."""
    if is_disk_full(error):
        number = errno.ENOSPC
        if isinstance(error, OSError) and error.errno:
            number = error.errno
        return OSError(number, f"{os.strerror(number)} ({_size_text(free_bytes(path))} free)", str(path))
    if isinstance(error, OSError) and str(error.filename or "").startswith(str(temp_path)):
        return OSError(error.errno, error.strerror, str(path))
    return None


def commit(temp_path: Path, path: Path, *, durable: bool = False) -> None:
    """Rename what was written at `temp_path` to `path`, in place of what is there. `durable`: once it is on the disk.

    The umask then decides who may read the files: those of safetensors are private to their owner at first. Raises
    IsADirectoryError where a file would take the place of a folder.
    """
    for part in (*temp_path.rglob("*"), temp_path):
        if part.stat().st_mode & 0o777 == _PRIVATE_MODE:
            part.chmod(0o666 & ~_umask())
        if durable:
            flush(part)
    if path.is_dir() and temp_path.is_dir():
        _replace_folder(temp_path, path)
    else:
        temp_path.replace(path)
    if durable:
        flush(path.parent)


def _replace_folder(temp_path: Path, path: Path) -> None:
    """Give `temp_path` the place of the folder `path`. The old folder is put aside first, and back after an error."""
    old_path = temp_path_for(path, _REPLACED_WRITER)
    remove(old_path)  # of a process that was killed here
    path.rename(old_path)  # since a rename replaces an empty folder only
    try:
        temp_path.replace(path)
    except OSError:
        old_path.rename(path)
        raise
    remove(old_path)


def write(path: Path, data: bytes, *, writer: int | str | None = None, durable: bool = False) -> None:
    """Write a file whole or not at all, by `atomic_write`. Raises OSError; that of a full disk says the size needed."""
    try:
        with atomic_write(path, writer=writer, durable=durable) as temp_path:
            temp_path.write_bytes(data)
    except OSError as error:
        if is_disk_full(error):
            error.strerror = f"{error.strerror}, {_size_text(len(data))} needed"
        raise


def check_writable(folder: Path) -> None:
    """Raise OSError where a folder, which exists or is to be made, cannot be written to. Writes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(existing, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def sweep(folder: Path, *, is_users: bool = False) -> None:
    """Remove the temporary files in a folder whose writers have stopped; call it before writing there.

    A folder that was put aside by a writer that was killed, before the new one had its name, gets its name back.
    Temporary files of another machine go when they are a day old, for nobody here knows whether their writers run.
    `is_users`: the folder is the user's, where a file called `.X.old.tmp` may be theirs; False: dumo made it.
    """
    for temp_path in folder.glob(".*.tmp"):
        if is_users and temp_path.name.endswith(f".{_REPLACED_WRITER}.tmp"):
            continue
        with suppress(OSError):  # another process sweeps, too
            if _is_abandoned(temp_path):
                _restore_or_remove(temp_path)


def _restore_or_remove(temp_path: Path) -> None:
    """Remove what is abandoned; but a folder that was put aside is put back, where nothing has its name.

    It stays aside while another process writes a folder of that name.
    """
    name = _TEMP_NAME.fullmatch(temp_path.name)
    assert name is not None, "what is abandoned has such a name"
    path = temp_path.with_name(name["name"])
    if not name["replaced"] or not temp_path.is_dir() or os.path.lexists(path):
        remove(temp_path)
        return
    new_folders = temp_path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    if all(_is_abandoned(new_folder) for new_folder in new_folders):
        temp_path.rename(path)


def _is_abandoned(temp_path: Path) -> bool:
    """Whether nobody writes a temporary file or folder any more."""
    name = _TEMP_NAME.fullmatch(temp_path.name)
    if name is None:
        return False
    if name["replaced"]:
        return True
    if name["machine"] != machine_id():
        return time.time() - temp_path.stat().st_mtime > _ABANDONED_SECONDS
    process = int(name["process"])
    if process == os.getpid():
        return temp_path.absolute() not in _being_written
    return not _is_running(process)


def _is_running(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def machine_id() -> str:
    """A hash of this machine's name, of 8 characters."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _umask() -> int:
    """The bits of the mode that new files do not get."""
    mask = os.umask(0o077)  # it can be read by setting it only
    os.umask(mask)
    return mask


def _size_text(num_bytes: int) -> str:
    """A number of bytes as text: 1.5 GB, 20 MB."""
    if num_bytes >= 1e8:
        return f"{num_bytes / 1e9:,.3g} GB"
    return f"{num_bytes / 1e6:,.3g} MB"


def temp_path_for(path: Path, writer: int | str = "") -> Path:
    """The hidden path of a file or folder while it is written or removed; `writer` "": there is one at a time."""
    if writer == "":
        return path.with_name(f".{path.name}.tmp")
    return path.with_name(f".{path.name}.{writer}.tmp")


def remove(path: Path) -> None:
    """Remove a folder with its content, a file, or a link but not its target; a missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """The free bytes on the disk of a file or folder, which need not exist yet."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, the quota or the limit on a file's size is used up."""
    from safetensors import SafetensorError  # not for those who only read a text

    if isinstance(error, SafetensorError):  # has the number of the system's error in its text alone
        match = re.search(r"os error (\d+)", str(error))
        return match is not None and int(match[1]) in _DISK_FULL_ERRORS
    return isinstance(error, OSError) and error.errno in _DISK_FULL_ERRORS
