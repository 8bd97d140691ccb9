"""What the terminal shows: answers on stdout, pictures of progress and errors on stderr."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dumo.progress import Tick

out = Console(markup=False, emoji=False)  # what users typed is shown as they typed it
err = Console(markup=False, emoji=False, highlight=False, stderr=True)


@contextmanager
def bar(title: str, total: int, /) -> "Generator[Tick, None, None]":
    """A live progress bar on stderr."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)


@contextmanager
def resumable(command: str) -> Generator[None, None, None]:
    """Turn Ctrl-C into a line that says how to go on, and exit code 1."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"stopped; to go on from the last checkpoint:  {command}", soft_wrap=True)
        raise typer.Exit(1) from None


def say(line: str) -> None:
    """A line on stderr, as it is."""
    err.print(line, soft_wrap=True)


def show_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print a name and what is to be said of it, line by line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    out.print(table)


def show_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys, never narrower than its numbers: a narrow terminal wraps, but nothing is lost."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    needed = Console(width=10_000).measure(table).maximum
    Console(width=max(out.width, needed)).print(table)
