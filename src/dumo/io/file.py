"""Files and folders written whole or not at all: in a hidden place next to their own, then renamed.

So what stands under a name is whole, whenever the process stops. What is `durable` outlives the machine, too.
`locked` keeps other processes out; `guard_path` refuses writes below a folder once its path leads elsewhere.
`places` is where to keep what was found out about a user's files.
"""

import errno
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from dumo.io import digest
from dumo.types import UserError

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
PRIVATE = 0o600  # as safetensors makes its files
DAY = 86_400.0  # seconds
GOING = "old"  # in place of a writer: of what is being removed
OPEN: set[Path] = set()  # hidden places that threads of this process are writing now
GUARDED: dict[Path, int] = {}  # folders that must stay where they are (`guard_path`), each with a descriptor of it
WRITER = re.compile(rf"\..+\.(?:(?P<machine>[0-9a-f]{{8}})-(?P<process>\d+)|(?P<going>{GOING}))\.tmp")


@contextmanager
def whole(path: Path, *, writer: int | str | None = None, durable: bool = False) -> Generator[Path, None, None]:
    """Yield a hidden place for a file or a folder, which becomes `path` when all went well, and is removed when not.

    `writer` is different for each that may write this path at once; None: this process. `durable`: wait for the disk.
    Raises OSError, which names `path`, for a full disk or a forbidden folder; what stood there before then still
    stands.
    """
    half = hidden(path, own() if writer is None else writer)
    OPEN.add(half.absolute())
    try:
        require_in_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield half
        settle(half, path, durable=durable)
    except BaseException as error:
        remove(half)
        if of_place := of_path(error, half, path):
            raise of_place from error
        raise
    finally:
        OPEN.discard(half.absolute())


def of_path(error: BaseException, half: Path, path: Path) -> OSError | None:
    """What kept `half` from being written, said of `path`; None where the error says it already, or is another."""
    if full(error):
        number = (error.errno if isinstance(error, OSError) else None) or errno.ENOSPC
        return OSError(number, f"{os.strerror(number)} ({size(free(path))} free)", str(path))
    if isinstance(error, OSError) and str(error.filename or "").startswith(str(half)):
        return OSError(error.errno, error.strerror, str(path))
    return None


def settle(half: Path, path: Path, *, durable: bool = False) -> None:
    """Give what was written at `half` its name; a folder that stands there goes. `durable`: once it is on the disk.

    Files may then be read by whom the umask lets: what safetensors writes none but its owner may.
    """
    for part in (*half.rglob("*"), half):
        if part.stat().st_mode & 0o777 == PRIVATE:
            part.chmod(0o666 & ~umask())
        if durable:
            flush(part)
    if path.is_dir():
        remove(path.rename(hidden(path, GOING)))  # a folder takes the place of an empty one only
    half.replace(path)
    if durable:
        flush(path.parent)


def write(path: Path, data: bytes, *, writer: int | str | None = None, durable: bool = False) -> None:
    """Write a file as `whole` does; the error of a full disk says what the file needs."""
    try:
        with whole(path, writer=writer, durable=durable) as half:
            half.write_bytes(data)
    except OSError as error:
        if full(error):
            error.strerror = f"{error.strerror}, {size(len(data))} needed"
        raise


def check_writable(folder: Path) -> None:
    """Raise OSError where nothing can be written in a folder that is there, or to be made; nothing is written."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(there, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def sweep(folder: Path, *, ours: bool = True) -> None:
    """Remove what writers that are gone left half-written in a folder; before writing there.

    Of another machine's writers only what is a day old, for nobody here knows whether they run. Not `ours`: a folder
    of the user's, where what is called `.X.old.tmp` may be theirs.
    """
    for half in folder.glob(".*.tmp"):
        with suppress(OSError):  # another one sweeps, too
            if (ours or not half.name.endswith(f".{GOING}.tmp")) and gone(half):
                remove(half)


def gone(half: Path) -> bool:
    """Whether the writer of a hidden file or folder is; of this process, whether no thread of it is writing there."""
    found = WRITER.fullmatch(half.name)
    if found is None:
        return False
    if found["going"]:
        return True
    if found["machine"] != machine():
        return time.time() - half.stat().st_mtime > DAY
    pid = int(found["process"])
    return half.absolute() not in OPEN if pid == os.getpid() else not alive(pid)


def alive(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there is, another user's
        return True
    return True


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
    lock_file = path.stat()
    try:
        yield
    finally:
        # While it is held: who waits for it sees that it is gone, and makes it again. Where the folder was moved away,
        # another process may have its own there.
        try:
            with suppress(OSError):  # it is gone, or its disk is
                if os.path.samestat(lock_file, path.stat()):
                    path.unlink()
        finally:
            lock.release()


@contextmanager
def guard_path(folder: Path) -> Generator[None, None, None]:
    """While inside, writes below `folder` are refused (`require_in_place`) if its path no longer leads to this folder.

    The folder is kept open, so that its inode number is not reused.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    GUARDED[folder.absolute()] = descriptor
    try:
        yield
    finally:
        del GUARDED[folder.absolute()]
        os.close(descriptor)


def require_in_place(path: Path) -> None:
    """Raise UserError where `path`, or a folder above it, is guarded, and was removed, renamed or unmounted since."""
    for folder, descriptor in [*GUARDED.items()]:
        if not path.absolute().is_relative_to(folder):
            continue
        try:
            is_same = os.path.samestat(os.fstat(descriptor), folder.stat())
        except OSError:
            is_same = False
        if not is_same:
            raise UserError(
                f"{folder} was removed, renamed or unmounted during training, so nothing more is written there. "
                "Rename it back or mount it, and the same command resumes from its last checkpoint; if the run's "
                "folder was deleted, that starts a new run"
            )


def own() -> str:
    """This process, among those that may write here from any machine."""
    return f"{machine()}-{os.getpid()}"


def machine() -> str:
    """This machine's name, in short."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def umask() -> int:
    """What new files do not allow."""
    os.umask(mask := os.umask(0o077))  # it can be read by setting it only
    return mask


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.3g} GB" if count >= 1e8 else f"{count / 1e6:,.3g} MB"


def hidden(path: Path, writer: int | str = "") -> Path:
    """Where a file or folder lies while it is being written, or removed; '': there is one writer at a time."""
    return path.with_name(f".{path.name}.{writer}.tmp" if writer != "" else f".{path.name}.tmp")


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link but not what it leads to, as far as it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def cache() -> Path:
    """Where this user's notes lie, made or not. Raises RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dumo"


def places(folder: Path, name: str) -> list[Path]:
    """Where to look for a note on what is in a folder, and to write it, the best place first.

    Next to the files, hidden by its name. Else below $XDG_CACHE_HOME, or ~/.cache: in `dumo`, by the folder's path.
    """
    return [folder / name, cache() / digest.short(str(folder.resolve())) / name.removeprefix(".")]


def writable(place: Path) -> bool:
    """Whether something may be written there; makes the folders above it."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place.parent, os.W_OK | os.X_OK)
