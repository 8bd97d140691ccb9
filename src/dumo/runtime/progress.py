"""Showing how far a piece of work is: the work reports to a `Bar`, and knows no terminal.

Bars are `bar` (on stderr), `late` (only for work that takes long) and `no_bar`; `say` prints a line above a live one.
`number`, `sized`, `span`, `plain` and `inline` turn numbers and texts into what a terminal shows.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, runtime_checkable

Tick = Callable[[int, str], None]  # (units done so far, a note)
# what moves, colours, breaks or turns round a line, and halves of characters, which cannot be printed
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@runtime_checkable
class Bar(Protocol):
    """Shows how far a piece of work is: `with bar("training", 1000) as tick: tick(10, "loss 0.3")`."""

    def __call__(self, title: str, total: int, /) -> AbstractContextManager[Tick]:
        """Begin to show work of `total` units."""
        ...


@contextmanager
def no_bar(title: str, total: int, /) -> Generator[Tick, None, None]:
    """Shows nothing."""
    yield lambda done, note: None


def bar(title: str, total: int, /) -> AbstractContextManager[Tick]:
    """On stderr: a live bar on a terminal; in a log file, a line a minute."""
    is_live = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return _live_bar(title, total) if is_live else lines(title, total)


@contextmanager
def _live_bar(title: str, total: int, /) -> Generator[Tick, None, None]:
    """A bar that moves, by rich."""
    from rich import progress as parts
    from rich.console import Console

    columns = (
        parts.TextColumn("{task.description}", markup=False),
        parts.BarColumn(),
        parts.MofNCompleteColumn(),
        parts.TextColumn("{task.fields[rate]}", markup=False),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(),
        parts.TextColumn("{task.fields[note]}", markup=False),
    )
    with parts.Progress(*columns, console=Console(markup=False, emoji=False, stderr=True)) as progress:
        task = progress.add_task(inline(title), total=total, note="", rate="")

        def tick(done: int, note: str) -> None:
            rate = progress.tasks[0].speed
            rate_text = f"{number(rate)}/s" if rate else ""
            progress.update(task, completed=done, note=inline(note), rate=rate_text)

        yield tick


@contextmanager
def lines(
    title: str, total: int, /, *, every: float = 60.0, clock: Callable[[], float] = time.monotonic
) -> Generator[Tick, None, None]:
    """A plain line at most every few seconds, and one at the end: units done, their rate, the note, time left."""
    began = clock()
    last_shown = began
    ticks: list[tuple[float, int]] = []  # the first and the latest one: when, units done
    last_note = ""

    def show(done: int, ending: str) -> None:
        state = f"{title}: {done:,} of {total:,}"
        rate = speed(*ticks)
        if rate:
            state += f" at {number(rate)}/s"
        say(inline(", ".join(part for part in (state, last_note, ending) if part)))

    def tick(done: int, note: str) -> None:
        nonlocal last_shown, last_note
        ticks[1:] = [(clock(), done)]
        last_note = note
        if clock() - last_shown >= every:
            last_shown = clock()
            rate = speed(*ticks)
            show(done, f"{span((total - done) / rate)} left" if rate else "")

    yield tick
    done = ticks[-1][1] if ticks else 0
    show(done, f"took {span(clock() - began)}")


@contextmanager
def late(
    title: str, total: int, /, *, after: float = 3.0, clock: Callable[[], float] = time.monotonic, shown: Bar = bar
) -> Generator[Tick, None, None]:
    """A bar for work that is mostly short: it begins to show after some seconds (ours), and not before."""
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


def speed(*ticks: tuple[float, int]) -> float:
    """Units a second from the first tick to the last; 0 where that is not known."""
    if len(ticks) < 2:
        return 0.0
    (began, first), (now, done) = ticks
    return (done - first) / (now - began) if now > began else 0.0


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def sized(size: float, base: int = 1000) -> str:
    """Bytes with three significant digits or all before the point: 1.23 GB; of base 1024: 1.23 GiB."""
    units = ("KiB", "MiB", "GiB", "TiB", "PiB") if base == 1024 else ("kB", "MB", "GB", "TB", "PB")
    power = 1
    while power < len(units) and size >= 999.5 * base**power:
        power += 1
    return f"{number(size / base**power)} {units[power - 1]}"


def nfe_text(n: int) -> str:
    """The number of passes of a sample through the net: '1 NFE', '2 NFE'."""
    return f"{n} NFE"


def say(line: str) -> None:
    """Print a line on stderr at once, above a live bar."""
    print(plain(line), file=sys.stderr, flush=True)


def teller(bar: Bar) -> Callable[[str], None]:
    """The function that prints lines next to a bar: `say`, or `quiet` where no bar is shown."""
    return quiet if bar is no_bar else say


def quiet(line: str) -> None:
    """Say nothing."""


def plain(text: str) -> str:
    """The text with control characters spelt out: a file's name must not steer the terminal. Line breaks stay."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def inline(text: str) -> str:
    """The text with control characters and line breaks spelt out."""
    return plain(text).replace("\n", r"\n")


def span(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"
