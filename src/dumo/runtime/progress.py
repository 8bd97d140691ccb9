"""Showing how far a piece of work is: the work reports to a `Bar`, and knows no terminal."""

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
    live = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return live_bar(title, total) if live else lines(title, total)


@contextmanager
def live_bar(title: str, total: int, /) -> Generator[Tick, None, None]:
    """A bar that moves."""
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
            progress.update(task, completed=done, note=inline(note), rate=f"{number(rate)}/s" if rate else "")

        yield tick


@contextmanager
def lines(
    title: str, total: int, /, *, every: float = 60.0, clock: Callable[[], float] = time.monotonic
) -> Generator[Tick, None, None]:
    """A plain line at most every few seconds, and one at the end: units done, their rate, the note, time left."""
    began = last = clock()
    ticks: list[tuple[float, int]] = []  # the first and the latest one: when, units done
    said = ""

    def show(done: int, end: str) -> None:
        rate = speed(*ticks)
        pace = f" at {number(rate)}/s" if rate else ""
        say(inline(", ".join(part for part in (f"{title}: {done:,} of {total:,}{pace}", said, end) if part)))

    def tick(done: int, note: str) -> None:
        nonlocal last, said
        ticks[1:], said = [(clock(), done)], note
        if clock() - last >= every:
            rate, last = speed(*ticks), clock()
            show(done, f"{span((total - done) / rate)} left" if rate else "")

    yield tick
    show(ticks[-1][1] if ticks else 0, f"took {span(clock() - began)}")


@contextmanager
def late(
    title: str, total: int, /, *, after: float = 3.0, clock: Callable[[], float] = time.monotonic, shown: Bar = bar
) -> Generator[Tick, None, None]:
    """A bar for work that is mostly short: it begins to show after some seconds (ours), and not before."""
    began, show = clock(), None
    with ExitStack() as later:

        def tick(done: int, note: str) -> None:
            nonlocal show
            if show is None and clock() - began >= after:
                show = later.enter_context(shown(title, total))
            if show:
                show(done, note)

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
    units = [f"{letter}{'i' if base == 1024 else ''}B" for letter in ("k" if base == 1000 else "K", *"MGTP")]
    power = next((i for i in range(len(units)) if size < 999.5 * base ** (i + 1)), len(units) - 1)
    return f"{number(size / base ** (power + 1))} {units[power]}"


def passes_text(n: int) -> str:
    """'1 pass', '2 passes'."""
    return "1 pass" if n == 1 else f"{n} passes"


def say(line: str) -> None:
    """Print a line on stderr at once, above a live bar."""
    print(plain(line), file=sys.stderr, flush=True)


def teller(bar: Bar) -> Callable[[str], None]:
    """What says lines next to a bar: `say`; nothing where no bar is shown."""
    return quiet if bar is no_bar else say


def quiet(line: str) -> None:
    """Say nothing."""


def plain(text: str) -> str:
    """The text with control characters spelt out: a file's name must not steer the terminal. Line breaks stay."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def inline(text: str) -> str:
    """The same in one line."""
    return plain(text).replace("\n", r"\n")


def span(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:03."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
