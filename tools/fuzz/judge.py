"""Whether an input was taken as it should be: with what it asks done, or by plain words; soon, and in little memory."""

import resource
import signal
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager

from dumo.types import UserError

SECONDS = 20  # of the clock, on a busy machine
BYTES = 2**31  # more than there was
WORDS = 4000  # characters of a refusal
GOOD = ("taken", "refused")  # ends that should be


class Late(BaseException):
    """It takes too long; no `except Exception` may hold it."""


@contextmanager
def limited(seconds: float = SECONDS, more: int = BYTES) -> Generator[None, None, None]:
    """Raise `Late` after so many seconds, and MemoryError beyond so many bytes of address space more."""

    def late(number: int, frame: object) -> None:
        raise Late

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def wrong(read: Callable[[], object]) -> tuple[str, str]:
    """How it ended: 'taken' or 'refused', or what should not be; and the words, or where that was."""
    started = time.perf_counter()
    try:
        with limited():
            read()
    except UserError as error:
        return plain(str(error)), str(error)
    except OSError as error:  # the command line says it in a line, and ends with 2
        return ("refused" if error.strerror else "bare OSError"), str(error)
    except Late as error:
        return f"late, {time.perf_counter() - started:.0f} s", place(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__, f"{error} {place(error)}"
    return "taken", ""


def plain(said: str) -> str:
    """Whether a refusal is one that a person reads."""
    if not said.strip() or len(said) > WORDS:
        return f"refused in {len(said)} characters"
    return "refused"


def place(error: BaseException) -> str:
    """The last line of dumo's own on the way to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/dumo/" in frame.filename]
    return f"{frames[-1].filename.split('/dumo/')[-1]}:{frames[-1].lineno}" if frames else ""
