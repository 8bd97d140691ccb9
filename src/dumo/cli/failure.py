"""What a command that failed says, in a line, and its exit code: 2 for what the user can mend, 1 for all else."""

import errno
import re
from collections.abc import Generator
from contextlib import contextmanager

from dumo.runtime.progress import inline

MEMORY = re.compile(r"out of memory|can't allocate memory|Unable to allocate|_STATUS_ALLOC_FAILED")
AMOUNT = re.compile(r"allocate ([\d.]+ \w+)")
MORE = "use a device with more memory (--device cpu takes the machine's), or end what else runs there"


def told(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error, and the exit code; None where it is a defect, of which the traceback is wanted."""
    if starved(error):
        amount = AMOUNT.search(str(error))
        way_out = "; ".join(getattr(error, "__notes__", [MORE]))
        return f"out of memory{f' at {amount[1]} more' if amount else ''}: {way_out}", 1
    if isinstance(error, OSError):  # a full disk, a folder that may not be written to
        way_out = ": raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        return inline(f"{error.filename or 'writing'}: {error.strerror or error}{way_out}"), 2
    if not isinstance(error, ValueError | RuntimeError):  # what dumo's own errors derive from
        return None
    from dumo.runtime.heartbeat import Lost
    from dumo.training.step import Diverged
    from dumo.types import UserError

    if isinstance(error, UserError):
        return str(error), 2
    return (str(error), 1) if isinstance(error, Diverged | Lost) else None


def starved(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of the machine or of a GPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(MEMORY.search(str(error))))


@contextmanager
def sparing(way_out: str) -> Generator[None, None, None]:
    """Say how this work would take less memory, where there is too little."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if starved(error):
            error.add_note(way_out)
        raise
