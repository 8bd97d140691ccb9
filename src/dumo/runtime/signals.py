"""Stopping when asked from outside: a signal is noted, and long work polls for it between its pieces.

The command line enters `listening`. Work that has something to save calls `poll` and saves; other work calls `check`.

A scheduler that takes a machine back says so some seconds before (SIGTERM; SIGUSR1 where it was set to), a terminal
that is closed by SIGHUP, a person by Ctrl-C. The running work then saves what there is and raises `Stopped`. A second
signal of the same kind does what it did before: it ends the process at once. A process that works for another one, as a
rank does for torchrun, is asked to stop, too, where that one is gone. A scheduler may signal both, and torchrun passes
the signal on to its ranks: so what comes again within REPEAT_SECONDS is no second signal.
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
REPEAT_SECONDS = 2.0  # within which one request may come twice: ours
LAUNCHED = "TORCHELASTIC_RUN_ID"  # torchrun sets it for those it starts

received: int | None = None  # the signal that asked this process to stop, once one has
listens = False  # whether `listening` is entered
finishing = False  # whether `finished` is entered
parent: int | None = None  # the process without which this one is to stop


class Stopped(RuntimeError):  # noqa: N818, it is no error
    """The work was stopped from outside, and what there was is saved. The command line exits with 128 + the signal."""

    def __init__(self, number: int, text: str = "") -> None:
        if not text:
            text = "stopped" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        super().__init__(text)
        self.number = number

    def __reduce__(self) -> tuple[type["Stopped"], tuple[int, str]]:
        """As it is sent from one process to another."""
        return type(self), (self.number, str(self))


def poll() -> int | None:
    """The number of the signal that asked this process to stop; None while nobody has."""
    global received
    if received is None and parent is not None and os.getppid() != parent:
        received = signal.SIGTERM
    return received


def check() -> None:
    """Raise Stopped if the process was asked to stop: for work that has nothing to save, or has saved it."""
    if finishing:
        return
    number = poll()
    if number is not None:
        raise Stopped(number)


@contextmanager
def finished() -> Generator[None, None, None]:
    """Inside, `check` raises nothing: for a short piece that ranks make together, and that only this step can make."""
    global finishing
    before = finishing
    finishing = True
    try:
        yield
    finally:
        finishing = before


@contextmanager
def listening(
    tell: Callable[[int], object] = lambda number: None, *, child: bool | None = None
) -> Generator[None, None, None]:
    """Handle the signals, in the main thread; elsewhere, and of those that are ignored (nohup), nothing changes.

    `tell` is called with the number of each as it comes, between any two instructions. `child`: stop where the process
    that started this one is gone; None: if that is torchrun.
    """
    global received, listens, parent
    if listens or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers_before: dict[int, Any] = {}
    first_received: dict[int, float] = {}  # when, by signal

    def handle(number: int, frame: FrameType | None) -> None:
        global received
        if number not in first_received:
            received = number
            first_received[number] = time.monotonic()
            if parent is None:
                signal.signal(number, handlers_before[number])
            tell(number)
        elif time.monotonic() - first_received[number] > REPEAT_SECONDS:
            signal.signal(number, handlers_before[number])
            signal.raise_signal(number)

    if child is None:
        child = LAUNCHED in os.environ
    received = None
    listens = True
    parent = os.getppid() if child else None
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            handlers_before[number] = handler
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        received = None
        listens = False
        parent = None


@contextmanager
def default_handlers() -> Generator[None, None, None]:
    """Inside, a signal that is handled else ends the process at once: for a wait in C, where no handler would run."""
    check()
    handlers_before: dict[int, Any] = {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if listens and callable(handler):
            handlers_before[number] = handler
    for number in handlers_before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
