"""Show how far a piece of work is. The work reports to a `Bar`, and knows no terminal.

    with bar("training", 1000) as tick:
        tick(10, "loss 0.3")  # units done so far, and a note

- Bars: `bar` shows on stderr, by `log_bar` where that is no terminal; `delayed_bar` shows only work that takes long;
  `no_bar` shows nothing; `bar_of_seconds` gives one whose units are seconds.
- Lines: `print_line` prints one above a live bar. `line_printer` gives it to work that has a bar, and `ignore_line`
  to work without one.

How numbers are written is in `dumo.runtime.text`.
"""

import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dumo.runtime.text import duration_text, escape_controls, escape_line, number_text

if TYPE_CHECKING:
    from rich.console import Console

Tick = Callable[[int, str], None]  # (units done so far, a note)
_LOG_SECONDS = 60.0  # between two lines of a bar in a log file: chosen by us
_DELAY_SECONDS = 3.0  # after which `delayed_bar` begins to show: chosen by us

_outer_console: "Console | None" = None  # that of the live bar that is shown; None: none is


@runtime_checkable
class Bar(Protocol):
    """A way to show how far a piece of work is."""

    def __call__(self, title: str, total: int, /) -> AbstractContextManager[Tick]:
        """Show work of `total` units while inside; the context gives the `Tick` that the work calls."""
        ...


@contextmanager
def no_bar(title: str, total: int, /) -> Generator[Tick, None, None]:
    """A bar that shows nothing."""
    yield lambda done, note: None


def bar(title: str, total: int, /) -> AbstractContextManager[Tick]:
    """A bar on stderr: a live one on a terminal, else a line each minute."""
    return _live_bar(title, total) if _is_live() else log_bar(title, total)


def bar_of_seconds(inner: Bar) -> Bar:
    """Replace `bar` by one that shows its units as seconds: 4:12 of 6:00.

    Another bar is returned unchanged: a caller's own bar has no way to learn its units.
    """
    return _seconds_bar if inner is bar else inner


def _seconds_bar(title: str, total: int, /) -> AbstractContextManager[Tick]:
    """A bar on stderr like `bar`, whose units are seconds."""
    if _is_live():
        return _live_bar(title, total, are_seconds=True)
    return log_bar(title, total, are_seconds=True)


def _is_live() -> bool:
    """Whether stderr shows lines that move."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def _live_bar(title: str, total: int, /, *, are_seconds: bool = False) -> Generator[Tick, None, None]:
    """A bar that moves, by rich. Inside another live bar it is shown below that."""
    from rich import progress as parts  # slow to import

    columns: list[parts.ProgressColumn] = [parts.TextColumn("{task.description}", markup=False), parts.BarColumn()]
    if not are_seconds:  # seconds are their own clock, and need no rate
        columns += [
            parts.MofNCompleteColumn(),
            parts.TextColumn("{task.fields[rate]}", markup=False),
            parts.TimeElapsedColumn(),
            parts.TimeRemainingColumn(),
        ]
    columns.append(parts.TextColumn("{task.fields[note]}", markup=False))
    with _shared_console() as console, parts.Progress(*columns, console=console) as progress:
        task = progress.add_task(escape_line(title), total=total, note="", rate="")

        def tick(done: int, note: str) -> None:
            if are_seconds:
                note = _join(f"{duration_text(done)} of {duration_text(total)}", note)
            rate = progress.tasks[0].speed
            rate_text = f"{number_text(rate)}/s" if rate else ""
            progress.update(task, completed=done, note=escape_line(note), rate=rate_text)

        yield tick


@contextmanager
def _shared_console() -> Generator["Console", None, None]:
    """The console of the live bar that is shown, or a new one. Bars on two consoles would write over each other."""
    global _outer_console
    if _outer_console is not None:
        yield _outer_console
        return
    from rich.console import Console

    _outer_console = Console(markup=False, emoji=False, stderr=True)
    try:
        yield _outer_console
    finally:
        _outer_console = None


@contextmanager
def log_bar(
    title: str,
    total: int,
    /,
    *,
    every: float = _LOG_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    are_seconds: bool = False,
) -> Generator[Tick, None, None]:
    """A bar of plain lines for log files: one at most every `every` seconds, and one at the end.

    A line has the units done, their rate, the latest note, and the time left; without rate and time left where the
    units themselves `are_seconds`. `clock` gives seconds.
    """
    began = clock()
    last_shown = began
    first_tick: tuple[float, int] | None = None  # when it came, in seconds of the clock, and the units done then
    last_tick: tuple[float, int] | None = None
    last_note = ""
    amount_text = duration_text if are_seconds else "{:,}".format

    def rate_so_far() -> float:
        """Units per second; 0 where it is not known, and where units are seconds, which need no rate."""
        if are_seconds or first_tick is None or last_tick is None:
            return 0.0
        return _units_per_second(first_tick, last_tick)

    def show(done: int, ending: str) -> None:
        state = f"{title}: {amount_text(done)} of {amount_text(total)}"
        rate = rate_so_far()
        if rate:
            state += f" at {number_text(rate)}/s"
        print_line(escape_line(_join(state, last_note, ending)))

    def tick(done: int, note: str) -> None:
        nonlocal first_tick, last_tick, last_shown, last_note
        last_tick = (clock(), done)
        first_tick = first_tick or last_tick
        last_note = note
        if clock() - last_shown < every:
            return
        last_shown = clock()
        rate = rate_so_far()
        time_left = ""
        if rate:
            time_left = f"{duration_text((total - done) / rate)} left"
        show(done, time_left)

    # no `finally`: work that failed or was stopped has no last line
    yield tick
    done = last_tick[1] if last_tick else 0
    show(done, "" if are_seconds else f"took {duration_text(clock() - began)}")


@contextmanager
def delayed_bar(
    title: str,
    total: int,
    /,
    *,
    after: float = _DELAY_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    inner: Bar = bar,
) -> Generator[Tick, None, None]:
    """A bar for work that is mostly short: `inner` begins at the first tick after `after` seconds."""
    began = clock()
    inner_tick: Tick | None = None
    with ExitStack() as stack:

        def tick(done: int, note: str) -> None:
            nonlocal inner_tick
            if inner_tick is None and clock() - began >= after:
                inner_tick = stack.enter_context(inner(title, total))
            if inner_tick:
                inner_tick(done, note)

        yield tick


def _units_per_second(first_tick: tuple[float, int], last_tick: tuple[float, int]) -> float:
    """The rate between two ticks, each (seconds, units done); 0 where no time has passed."""
    began, first_done = first_tick
    now, done = last_tick
    return (done - first_done) / (now - began) if now > began else 0.0


def _join(*parts: str) -> str:
    """The parts that are not empty, with commas between them."""
    return ", ".join(part for part in parts if part)


def print_line(line: str) -> None:
    """Print a line on stderr at once, above a live bar."""
    print(escape_controls(line), file=sys.stderr, flush=True)


def line_printer(work_bar: Bar) -> Callable[[str], None]:
    """The function that prints the lines of work with this bar: `print_line`, but `ignore_line` with `no_bar`."""
    return ignore_line if work_bar is no_bar else print_line


def ignore_line(line: str) -> None:
    """Print nothing: in place of `print_line`."""
