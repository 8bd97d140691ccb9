"""How a trial ends: what was read is taken, or refused in plain words; soon, and in little memory.

`outcome_of` runs a reader and names its end. `try_all` runs many trials, counts their ends, and keeps a line for each
end that should not be. `limits` bounds the time and memory of a block; `last_dumo_line` says where an error arose.
"""

import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from dumo.types import UserError

MAX_SECONDS = 20  # of the clock, on a busy machine
MAX_EXTRA_BYTES = 2**31  # of address space, above what the process has
MAX_REFUSAL_CHARACTERS = 4000
EXPECTED_ENDS = ("taken", "refused", "done", "failed in a line")  # the last two are of commands


class TooSlow(BaseException):
    """A trial takes too long. No `except Exception` of the code that is tried may catch it."""


class Outcome(NamedTuple):
    """How a trial ended."""

    end: str  # one of EXPECTED_ENDS, or what should not be, such as the name of an error
    detail: str  # the message, or where the error arose


Trial = tuple[str, Callable[[], Outcome]]  # a name by which the trial can be made again, and what makes it


@dataclass
class Tally:
    """What came of many trials."""

    ends: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])  # a line for each kind of end that should not be

    def __str__(self) -> str:
        """The ends and how often each was seen, the most frequent first."""
        return ", ".join(f"{end} {count}" for end, count in self.ends.most_common())


def try_all(trials: Iterable[Trial]) -> Tally:
    """Run trials in turn. Faults of one end and message are listed once, by their first trial."""
    tally = Tally()
    known: set[tuple[str, str]] = set()
    for name, run_trial in trials:
        outcome = run_trial()
        tally.ends[outcome.end] += 1
        kind = (outcome.end, outcome.detail[-40:])
        if outcome.end not in EXPECTED_ENDS and kind not in known:
            known.add(kind)
            tally.faults.append(f"{name}: {outcome.end}: {outcome.detail[:400]}")
    return tally


@contextmanager
def limits(seconds: float = MAX_SECONDS, extra_bytes: int = MAX_EXTRA_BYTES) -> Generator[None, None, None]:
    """Inside, TooSlow is raised after `seconds`, and MemoryError beyond `extra_bytes` more address space."""

    def raise_too_slow(number: int, frame: object) -> None:
        raise TooSlow

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    handler_before = signal.signal(signal.SIGALRM, raise_too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_bytes, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler_before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome_of(read: Callable[[], object]) -> Outcome:
    """Call `read` within the limits, and say how it ended."""
    start = time.perf_counter()
    try:
        with limits():
            read()
    except KeyboardInterrupt:
        raise
    except UserError as error:
        message = str(error)
        if not message.strip() or len(message) > MAX_REFUSAL_CHARACTERS:
            return Outcome(f"refused in {len(message)} characters", message)
        return Outcome("refused", message)
    except OSError as error:  # the command line prints its strerror, and ends with 2
        return Outcome("refused" if error.strerror else "bare OSError", str(error))
    except TooSlow as error:
        return Outcome(f"late, {time.perf_counter() - start:.0f} s", last_dumo_line(error))
    except BaseException as error:
        return Outcome(type(error).__name__, f"{error} {last_dumo_line(error)}")
    return Outcome("taken", "")


def last_dumo_line(error: BaseException) -> str:
    """The file of dumo and the line through which an error came last, as `io/read.py:12`; "" where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/dumo/" in frame.filename]
    if not frames:
        return ""
    _, _, file = frames[-1].filename.rpartition("/dumo/")
    return f"{file}:{frames[-1].lineno}"
