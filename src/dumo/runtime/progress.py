"""Showing how far a piece of work is. The work reports to a `Bar`, and knows no terminal.

    with bar("training", 1000) as tick:
        tick(10, "loss 0.3")  # units done so far, and a note

- Bars: `bar` shows on stderr, by `log_bar` where that is no terminal; `delayed_bar` shows only work that takes long;
  `no_bar` shows nothing; `bar_of_seconds` gives one whose units are seconds.
- Lines: `print_line` prints one above a live bar. `line_printer` gives it to work that has a bar, and `ignore_line`
  to work without one.
- Texts: `number_text`, `bytes_text`, `duration_text` and `nfe_text` write numbers. `escape_controls` and `escape_line`
  make texts of others safe to print.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, runtime_checkable

Tick = Callable[[int, str], None]  # (units done so far, a note)
LOG_SECONDS = 60.0  # between two lines of a bar in a log file: ours
DELAY_SECONDS = 3.0  # after which `delayed_bar` begins to show: ours
# Characters that move the cursor, colour, break or turn round a line, and halves of characters, which cannot be printed
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


def bar_of_seconds(shown: Bar) -> Bar:
    """The bar that shows units as seconds, 4:12 of 6:00, where `shown` is ours; any other is returned as it is."""
    return _seconds_bar if shown is bar else shown


def _seconds_bar(title: str, total: int, /) -> AbstractContextManager[Tick]:
    """On stderr: as `bar`, and units are seconds, which need no rate."""
    if _is_live():
        return _live_bar(title, total, are_seconds=True)
    return log_bar(title, total, are_seconds=True)


def _is_live() -> bool:
    """Whether stderr shows lines that move."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def _live_bar(title: str, total: int, /, *, are_seconds: bool = False) -> Generator[Tick, None, None]:
    """A bar that moves, by rich."""
    from rich import progress as parts  # slow to import
    from rich.console import Console

    count_columns = (
        parts.MofNCompleteColumn(),
        parts.TextColumn("{task.fields[rate]}", markup=False),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(),
    )
    columns = (
        parts.TextColumn("{task.description}", markup=False),
        parts.BarColumn(),
        *(() if are_seconds else count_columns),
        parts.TextColumn("{task.fields[note]}", markup=False),
    )
    with parts.Progress(*columns, console=Console(markup=False, emoji=False, stderr=True)) as progress:
        task = progress.add_task(escape_line(title), total=total, note="", rate="")

        def tick(done: int, note: str) -> None:
            if are_seconds:
                note = f"{duration_text(done)} of {duration_text(total)}, {note}"
            rate = progress.tasks[0].speed
            rate_text = f"{number_text(rate)}/s" if rate else ""
            progress.update(task, completed=done, note=escape_line(note), rate=rate_text)

        yield tick


@contextmanager
def log_bar(
    title: str,
    total: int,
    /,
    *,
    every: float = LOG_SECONDS,
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

    def rate_so_far() -> float:
        if first_tick is None or last_tick is None:
            return 0.0
        return _units_per_second(first_tick, last_tick)

    def show(done: int, ending: str) -> None:
        amount_text = duration_text if are_seconds else "{:,}".format
        state = f"{title}: {amount_text(done)} of {amount_text(total)}"
        rate = rate_so_far()
        if rate and not are_seconds:
            state += f" at {number_text(rate)}/s"
        print_line(escape_line(", ".join(part for part in (state, last_note, ending) if part)))

    def tick(done: int, note: str) -> None:
        nonlocal first_tick, last_tick, last_shown, last_note
        last_tick = (clock(), done)
        first_tick = first_tick or last_tick
        last_note = note
        if clock() - last_shown >= every:
            last_shown = clock()
            rate = rate_so_far()
            show(done, f"{duration_text((total - done) / rate)} left" if rate and not are_seconds else "")

    yield tick
    done = last_tick[1] if last_tick else 0
    show(done, "" if are_seconds else f"took {duration_text(clock() - began)}")


@contextmanager
def delayed_bar(
    title: str,
    total: int,
    /,
    *,
    after: float = DELAY_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    shown: Bar = bar,
) -> Generator[Tick, None, None]:
    """A bar for work that is mostly short: `shown` begins at the first tick after `after` seconds."""
    began = clock()
    shown_tick: Tick | None = None
    with ExitStack() as stack:

        def tick(done: int, note: str) -> None:
            nonlocal shown_tick
            if shown_tick is None and clock() - began >= after:
                shown_tick = stack.enter_context(shown(title, total))
            if shown_tick:
                shown_tick(done, note)

        yield tick


def _units_per_second(first_tick: tuple[float, int], last_tick: tuple[float, int]) -> float:
    """The rate between two ticks, each (seconds, units done); 0 where no time has passed."""
    began, first_done = first_tick
    now, done = last_tick
    return (done - first_done) / (now - began) if now > began else 0.0


def number_text(value: float) -> str:
    """A number with three significant digits, or with all digits before the point: 0.123, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bytes_text(size: float, base: int = 1000) -> str:
    """A number of bytes as text: 1.23 GB, or, with base 1024, 1.23 GiB."""
    units = ("KiB", "MiB", "GiB", "TiB", "PiB") if base == 1024 else ("kB", "MB", "GB", "TB", "PB")
    power = 1
    while power < len(units) and size >= 999.5 * base**power:
        power += 1
    return f"{number_text(size / base**power)} {units[power - 1]}"


def nfe_text(n: int) -> str:
    """A number of passes of a sample through the net as text: 1 NFE, 2 NFE."""
    return f"{n} NFE"


def print_line(line: str) -> None:
    """Print a line on stderr at once, above a live bar."""
    print(escape_controls(line), file=sys.stderr, flush=True)


def line_printer(bar: Bar) -> Callable[[str], None]:
    """The function that prints the lines of work with this bar: `print_line`, but `ignore_line` with `no_bar`."""
    return ignore_line if bar is no_bar else print_line


def ignore_line(line: str) -> None:
    """Print nothing: in place of `print_line`."""


def escape_controls(text: str) -> str:
    """Spell out the control characters of a text, so that a file's name cannot steer the terminal. Line breaks stay."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def escape_line(text: str) -> str:
    """Spell out the control characters and line breaks of a text."""
    return escape_controls(text).replace("\n", r"\n")


def duration_text(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, 1:02:03, or as minutes and seconds, 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"
