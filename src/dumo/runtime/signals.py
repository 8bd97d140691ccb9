"""Graceful stops: signals are recorded, and long work polls for them.

1. The command line enters `listening`, which handles SIGNALS: Ctrl-C, SIGHUP of a closed terminal, and SIGTERM or
   SIGUSR1 of a scheduler that will soon kill the process.
2. The first signal is only recorded in `received_signal`. A second signal of the same kind has the effect that it had
   before `listening`, which usually ends the process at once.
3. Long work polls between its pieces. If it has something to save, it calls `poll`, saves, and raises `Stopped`. Other
   work calls `check`, which raises `Stopped`, except inside `uninterrupted`.

A process that works for another one, such as a rank of torchrun, also stops if the other process is gone. A scheduler
may signal both, and torchrun forwards the signal to its ranks, so a repetition within REPEAT_SECONDS does not count as
a second signal.

`default_handlers` is for waits in C code, during which Python handlers do not run.
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
# A repeated signal within this time does not count (our choice).
REPEAT_SECONDS = 2.0
# torchrun sets this variable in the environment of its ranks.
TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"

# The number of the signal that asked this process to stop. `dumo.cli.train_callback` sets it if a callback stops the
# training.
received_signal: int | None = None
# Whether `listening` and `uninterrupted` are entered.
is_listening = False
_is_uninterrupted = False
# The process stops if this parent process ends.
_parent_pid: int | None = None


class Stopped(RuntimeError):  # noqa: N818, not an error
    """The work was stopped by a signal, and its results so far are saved. The exit code is 128 + `number`."""

    def __init__(self, number: int, text: str = "") -> None:
        if not text:
            text = "stopped" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        super().__init__(text)
        self.number = number


def poll() -> int | None:
    """Return the number of the signal that asked this process to stop, or None."""
    global received_signal
    if received_signal is None and _parent_pid is not None and os.getppid() != _parent_pid:
        received_signal = signal.SIGTERM
    return received_signal


def check() -> None:
    """Raise Stopped if the process was asked to stop. For work that has nothing to save, or has saved it."""
    if _is_uninterrupted:
        return
    number = poll()
    if number is not None:
        raise Stopped(number)


@contextmanager
def uninterrupted() -> Generator[None, None, None]:
    """Within the context, `check` does not raise. For short collective work that must finish in this step."""
    global _is_uninterrupted
    was_uninterrupted = _is_uninterrupted
    _is_uninterrupted = True
    try:
        yield
    finally:
        _is_uninterrupted = was_uninterrupted


@contextmanager
def listening(
    on_signal: Callable[[int], object] = lambda number: None, *, child: bool | None = None
) -> Generator[None, None, None]:
    """Within the context, record signals instead of ending the process. Restore the handlers afterwards.

    Does nothing outside of the main thread and inside another `listening`. Ignored signals (nohup) stay ignored.

    `on_signal` is called with the number of each first signal as soon as it arrives, between any two instructions.
    `child`: whether to stop if the parent process is gone; None means only if it is torchrun.
    """
    global received_signal, is_listening, _parent_pid
    if is_listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    # The handlers before, and the time of arrival in seconds, by number of the signal.
    handlers_before: dict[int, Any] = {}
    received_at: dict[int, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        global received_signal
        if number not in received_at:
            received_signal = number
            received_at[number] = time.monotonic()
            # A child may receive the same request twice, from the scheduler and from its parent.
            if _parent_pid is None:
                signal.signal(number, handlers_before[number])
            on_signal(number)
        elif time.monotonic() - received_at[number] > REPEAT_SECONDS:
            signal.signal(number, handlers_before[number])
            signal.raise_signal(number)

    if child is None:
        child = TORCHRUN_VARIABLE in os.environ
    received_signal = None
    is_listening = True
    _parent_pid = os.getppid() if child else None
    for number in SIGNALS:
        handler = signal.getsignal(number)
        # None means a handler that C code has installed.
        if handler not in (signal.SIG_IGN, None):
            handlers_before[number] = handler
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        received_signal = None
        is_listening = False
        _parent_pid = None


@contextmanager
def default_handlers() -> Generator[None, None, None]:
    """Within the context, signals end the process at once. For a wait in C code, during which Python handlers wait.

    Raises Stopped if the process was already asked to stop.
    """
    check()
    handlers_before: dict[int, Any] = {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if is_listening and callable(handler):
            handlers_before[number] = handler
    for number in handlers_before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
