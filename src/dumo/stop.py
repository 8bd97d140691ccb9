"""Stopping when asked from outside: a signal leaves word, and long work looks for it between its pieces.

A scheduler that takes a machine back says so some seconds before (SIGTERM; SIGUSR1 where it was told to), a terminal
that is closed by SIGHUP, a person by Ctrl-C. Whoever works then saves what he has and raises `Stopped`. A second signal
of the same kind does what it did before: it ends the process at once.
"""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
heard: int | None = None  # the signal that asked, once one has


class Stopped(RuntimeError):  # noqa: N818, it is no error
    """The work was stopped from outside, and what there was is saved. The command line exits with 128 + the signal."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text or f"stopped by {signal.Signals(number).name}")
        self.number = number


def asked() -> int | None:
    """The number of the signal that asked this process to stop; None while nobody has."""
    return heard


def check() -> None:
    """Raise Stopped if the process was asked to stop: for work that has nothing to save, or has saved it."""
    if heard is not None:
        raise Stopped(heard)


@contextmanager
def listening() -> Generator[None, None, None]:
    """Hear the signals, in the main thread; elsewhere, and of those that are ignored (nohup), nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        global heard
        heard = number
        signal.signal(number, before[number])

    for number in SIGNALS:
        if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None):
            before[number] = old
            signal.signal(number, hear)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
