"""`dumo` by a clock that goes on by a second with each step, which writes checkpoints in the main thread.

So a run by the clock (`train.minutes`) is a function of where it begins, and two of them are equal to the bit.
"""

import time
from threading import Thread
from typing import Any

SECONDS_PER_STEP = 1.0


class StepClock:
    """Reads the seconds of the steps that this process has made."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


clock = StepClock()
# `dumo` takes the clock from here when it is imported.
time.perf_counter = clock

from dumo.run.trainer import Trainer  # noqa: E402, the same
from dumo.runtime import stopwatch  # noqa: E402, after the clock is replaced
from dumo.training import checkpoint  # noqa: E402, the same

stopwatch.wall_clock = clock
_train_step: Any = Trainer.train_step


def _train_step_of_a_second(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401, those of a step
    metrics = _train_step(*arguments, **options)
    clock.seconds += SECONDS_PER_STEP
    return metrics


Trainer.train_step = _train_step_of_a_second


class Inline(Thread):
    """A thread whose work is done when it starts: steps do not pass meanwhile."""

    def start(self) -> None:
        """As `run`."""
        self.run()


checkpoint.Thread = Inline
