"""Showing how far a piece of work is: whoever works says so to a `Bar`, and knows no terminal."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

Tick = Callable[[int, str], None]  # (units done so far, a note)


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
