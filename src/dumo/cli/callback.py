"""Callbacks of `dumo.train`, and how one ends the training: it raises `Stop`.

`stoppable_hooks` makes hooks of the training loop out of callbacks. A `Stop` asks the process to stop as a signal does:
so the next step is made, on all ranks, and its checkpoint is saved.
"""

import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from dumo.runtime import signals
from dumo.training.loop import Every
from dumo.training.record import Record
from dumo.training.state import State

Callback = Callable[[State, Record], None]


class Stop(Exception):  # noqa: N818, it is no error
    """Raised by a callback of `dumo.train`: the next step is the last one, and `train` returns the run, as saved there.

    The same `dumo.train` again resumes it.
    """


@contextmanager
def stoppable_hooks(callbacks: Sequence[Callback | Every]) -> Generator[list[Every], None, None]:
    """Yield the hooks of these callbacks; inside, a training that one of them stops ends without an error."""
    is_stopped = False

    def hook_of(callback: Callback | Every) -> Every:
        every = callback if isinstance(callback, Every) else Every(1, callback)

        def call(state: State, record: Record) -> None:
            nonlocal is_stopped
            try:
                every.f(state, record)
            except Stop:
                is_stopped = True
                signals.received_signal = signal.SIGTERM

        return Every(every.n, call)

    try:
        yield [hook_of(callback) for callback in callbacks]
    except signals.Stopped:
        if signals.is_listening and not is_stopped:  # a signal; elsewhere it was a callback, of this or another rank
            raise
    finally:
        if is_stopped:
            signals.received_signal = None
