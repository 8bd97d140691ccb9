"""Lock folders against other processes, and refuse writes after a folder was moved.

- `locked` holds a lock file, one process at a time.
- `guard_path` guards a folder. Code that writes files first calls `require_in_place`, which raises an error if a
  guarded folder was removed, renamed or unmounted.
"""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dumo.error import UserError

_guarded: dict[Path, int] = {}  # descriptors of folders that must stay where they are (`guard_path`), by path


@contextmanager
def locked(
    path: Path, busy: str | None = None, *, while_waiting: Callable[[], object] = lambda: None
) -> Generator[None, None, None]:
    """Hold the lock file `path`, one process at a time; the file is removed at the end.

    The lock is released if the process is killed. If another process holds it, raises UserError with the message
    `busy`; if `busy` is None, waits and repeatedly calls `while_waiting`, which may raise to cancel.
    """
    lock = FileLock(path, timeout=-1 if busy is None else 0)

    def is_cancelled() -> bool:
        while_waiting()
        return False

    try:
        lock.acquire(cancel_check=is_cancelled)
    except Timeout as error:
        raise UserError(f"{busy} ({path} is locked)") from error
    except OSError as error:
        # The error has a file name if the file cannot be opened, but not if it cannot be locked, as on some network
        # drives.
        if error.filename is not None:
            raise
        path.unlink(missing_ok=True)
        problem = f"this folder cannot be locked ({error.strerror}): use a folder on a file system with locks"
        raise OSError(error.errno, problem, str(path.parent)) from error
    try:
        lock_stat = path.stat()
        try:
            yield
        finally:
            # Remove the file while it is locked: a process that waits for it then sees that it is gone, and makes a
            # new one. Where the folder was moved away, another process may have its own lock file there.
            with suppress(OSError):  # it is gone, or its disk is
                if os.path.samestat(lock_stat, path.stat()):
                    path.unlink()
    finally:
        lock.release()


@contextmanager
def guard_path(folder: Path) -> Generator[None, None, None]:
    """While inside, writes below `folder` are refused (`require_in_place`) if its path no longer leads to this folder.

    The folder is kept open, so that its inode number is not reused.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    _guarded[folder.absolute()] = descriptor
    try:
        yield
    finally:
        del _guarded[folder.absolute()]
        os.close(descriptor)


def require_in_place(path: Path) -> None:
    """Raise UserError if `path`, or a folder above it, is guarded, and was removed, renamed or unmounted since."""
    for folder, descriptor in [*_guarded.items()]:
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
