"""Callbacks of `dumo.train`, and how one ends the training: it raises `Stop`.

A `Stop` asks the process to stop as a signal does: so the next step is made, on all ranks, and its checkpoint is saved.
"""

import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dumo.run.hooks import Hook
from dumo.runtime import signals
from dumo.training.metrics import StepMetrics
from dumo.training.state import State

if TYPE_CHECKING:
    from dumo.run.trainer import Trainer

# The signal that stands for a `Stop`.
STOP_SIGNAL = signal.SIGTERM
# Called with the state after a step, and what the step measured.
Callback = Callable[[State, StepMetrics], object]


class Stop(Exception):  # noqa: N818, it is no error
    """Raised by a callback of `dumo.train`: the next step is the last one, and `train` returns the run, as saved there.

    The same `dumo.train` again resumes it.
    """


class CallBack(Hook):
    """Calls the callbacks of `dumo.train` after each step."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks
        self.is_stopped = False

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Call all callbacks. If one raises `Stop`, ask this process to stop, unless a signal has done so already."""
        try:
            for callback in self.callbacks:
                callback(trainer.state, metrics)
        except Stop:
            if signals.poll() is None:
                self.is_stopped = True
                signals.received_signal = STOP_SIGNAL


@contextmanager
def called_back(trainer: "Trainer", callbacks: Sequence[Callback]) -> Generator[None, None, None]:
    """Call the callbacks after each step of a training; one that they stop inside ends without an error."""
    hook = CallBack(callbacks)
    trainer.hooks.append(hook)
    try:
        yield
    except signals.Stopped as stopped:
        # Where nobody listens to signals, a callback of another rank has stopped it. Where somebody does, another
        # signal may have come after a callback's.
        is_by_callback = hook.is_stopped and stopped.number == STOP_SIGNAL
        if signals.is_listening and not is_by_callback:
            raise
    finally:
        if hook.is_stopped and signals.received_signal == STOP_SIGNAL:
            signals.received_signal = None
