"""Stopping when asked from outside: a signal leaves word, and long work looks for it between its pieces.

A scheduler that takes a machine back says so some seconds before (SIGTERM; SIGUSR1 where it was set to), a terminal
that is closed by SIGHUP, a person by Ctrl-C. The running work then saves what there is and raises `Stopped`. A second
signal of the same kind does what it did before: it ends the process at once. A process that works for another one, as a
rank does for torchrun, is asked to stop, too, where that one is gone; and as it hears a scheduler that speaks to all
twice, by itself and from the other one, what comes soon again is not a second signal for it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
TWICE = 2.0  # seconds within which one word may come twice: ours
LAUNCHED = "TORCHELASTIC_RUN_ID"  # torchrun sets it for those it starts

heard: int | None = None  # the signal that asked, once one has
listens = False
finishing = False  # whether `check` waits
parent: int | None = None  # the process without which this one is to stop


class Stopped(RuntimeError):  # noqa: N818, it is no error
    """The work was stopped from outside, and what there was is saved. The command line exits with 128 + the signal."""

    def __init__(self, number: int, text: str = "") -> None:
        named = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"  # Ctrl-C needs no name
        super().__init__(text or f"stopped{named}")
        self.number = number

    def __reduce__(self) -> tuple[type["Stopped"], tuple[int, str]]:
        """As it is sent from one process to another."""
        return type(self), (self.number, str(self))


def poll() -> int | None:
    """The number of the signal that asked this process to stop; None while nobody has."""
    global heard
    if heard is None and parent is not None and os.getppid() != parent:
        heard = signal.SIGTERM
    return heard


def check() -> None:
    """Raise Stopped if the process was asked to stop: for work that has nothing to save, or has saved it."""
    if not finishing and (number := poll()) is not None:
        raise Stopped(number)


@contextmanager
def finished() -> Generator[None, None, None]:
    """Inside, `check` raises nothing: for a short piece that ranks make together, and that only this step can make."""
    global finishing
    before, finishing = finishing, True
    try:
        yield
    finally:
        finishing = before


@contextmanager
def listening(
    tell: Callable[[int], object] = lambda number: None, *, child: bool | None = None
) -> Generator[None, None, None]:
    """Hear the signals, in the main thread; elsewhere, and of those that are ignored (nohup), nothing changes.

    `tell` is called with the number of each as it comes, between any two instructions. `child`: stop where the process
    that started this one is gone; None: if that is torchrun.
    """
    global heard, listens, parent
    if listens or threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    came: dict[int, float] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        global heard
        if number not in came:
            heard, came[number] = number, time.monotonic()
            if parent is None:
                signal.signal(number, before[number])
            tell(number)
        elif time.monotonic() - came[number] > TWICE:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    heard, listens = None, True
    parent = os.getppid() if (LAUNCHED in os.environ if child is None else child) else None
    for number in SIGNALS:
        if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None):
            before[number] = old
            signal.signal(number, hear)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        heard, listens, parent = None, False, None


@contextmanager
def deaf() -> Generator[None, None, None]:
    """Meanwhile a signal that is listened to ends the process at once: for a wait in C, where nothing else is heard."""
    check()
    before = {number: signal.getsignal(number) for number in SIGNALS if listens}
    before = {number: old for number, old in before.items() if callable(old)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
