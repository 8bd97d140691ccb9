"""Progress bars. Work reports its progress to a `Bar`:

    with bar("training", 1000) as tick:
        tick(10, "loss 0.3")  # units done so far, and a note

`bar` shows the progress on stderr: as a rich progress bar on a terminal, else as a line per minute. `no_bar` shows
nothing. `print_line` prints a line above a bar.
"""

import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dumo.runtime.formatting import duration_text, escape_controls, escape_line, number_text

Tick = Callable[[int, str], None]  # (units done so far, a note)

# Seconds between two plain lines.
_LINE_SECONDS = 60.0
# A bar for work that took fewer seconds is removed at its end.
_SHORT_SECONDS = 3.0


@runtime_checkable
class Bar(Protocol):
    """A way to show progress."""

    def __call__(self, title: str, total: int, /) -> AbstractContextManager[Tick]:
        """Show the progress of `total` units of work inside the block. Yields the `Tick` that the work calls."""
        ...


@contextmanager
def no_bar(title: str, total: int, /) -> Generator[Tick, None, None]:
    """A bar that shows nothing."""
    yield lambda done, note: None


@contextmanager
def bar(title: str, total: int, /) -> Generator[Tick, None, None]:
    """A bar on stderr of the first rank: it moves on a terminal, and is a plain line each minute elsewhere."""
    if os.environ.get("RANK", "0") != "0":
        yield lambda done, note: None
        return

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    is_live = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    progress = Progress(*columns, console=_console(is_live), disable=not is_live, get_time=time.monotonic)
    task_id = progress.add_task(escape_line(title), total=total, rate="", note="")
    task = progress.tasks[0]
    began = time.monotonic()
    last_line = began

    def tick(done: int, note: str) -> None:
        nonlocal last_line
        rate = f"{number_text(task.speed)}/s" if task.speed else ""
        progress.update(task_id, completed=done, rate=rate, note=escape_line(note))
        if is_live or time.monotonic() - last_line < _LINE_SECONDS:
            return
        last_line = time.monotonic()
        left = f"{duration_text(task.time_remaining)} left" if task.time_remaining else ""
        facts = [f"{title}: {done:,} of {total:,}", rate, note, left]
        print_line(escape_line(", ".join(fact for fact in facts if fact)))

    with progress:
        yield tick
        progress.live.transient = time.monotonic() - began < _SHORT_SECONDS


@cache
def _console(is_live: bool) -> Console:
    """Return the console that all bars share, because bars on different consoles would overwrite each other."""
    return Console(markup=False, emoji=False, stderr=True, force_terminal=is_live, force_interactive=is_live)


def print_line(line: str) -> None:
    """Print a line on stderr at once, above a live bar."""
    print(escape_controls(line), file=sys.stderr, flush=True)


def line_printer(work_bar: Bar) -> Callable[[str], None]:
    """Return the function that prints lines next to this bar: `ignore_line` for `no_bar`, else `print_line`."""
    return ignore_line if work_bar is no_bar else print_line


def ignore_line(line: str) -> None:
    """Print nothing, in place of `print_line`."""
