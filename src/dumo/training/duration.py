"""The duration of a training: a number of steps, or a time limit.

`train.steps` and `train.minutes` are totals: repeating the command, or a restart by torchrun or Slurm, continues to
that total. With `train.minutes`, a run ends after this time. Its learning rate decays with time, and its number of
steps is not known in advance.

`Duration.of` returns the duration of a new run, and `Duration.resolve` that of a resumed run. With a time limit,
`Clock.read` returns the `Timing` before each step on rank 0, whose clock decides for all ranks. `Timing` is saved in
checkpoints, so a resumed run continues its schedule from there.

With a time limit, the learning rate depends on the elapsed share s of the time, which grows from 0 to 1. With `left`
seconds remaining for steps at the last reading, and dt seconds since then,

    s' = s + (1 - s) dt / left,

which is linear in time. The share does not jump if a resumed command starts slowly, or if a checkpoint takes longer
than the one before. Changing `train.minutes` stretches the schedule: the share is then the trained time divided by the
new total.

The clock of a command runs from its start to its last line, except while images are encoded. The time is recorded only
in checkpoints, so a run that is stopped before its first checkpoint starts over. The first checkpoint is saved early
(FIRST_SAVE_SHARE) to measure its duration, so that time can be reserved for the last one.
"""

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict

from dumo.runtime import stopwatch
from dumo.runtime.formatting import minutes_text
from dumo.training.schedule import LearningRateSchedule
from dumo.training.settings import Train
from dumo.types import UserError

SECONDS_PER_MINUTE = 60.0
# The duration of a step is estimated by the median of this many steps.
_RECENT_STEPS = 5
# The share of the time after which a command saves its first checkpoint.
FIRST_SAVE_SHARE = 0.1


class Timing(BaseModel):
    """The elapsed time of a run with a time limit, read before the last step."""

    model_config = ConfigDict(frozen=True)

    # Total minutes of training: `train.minutes` at the time the share was measured.
    minutes: float
    # Elapsed seconds up to the last step.
    seconds: float = 0.0
    # The elapsed share of the schedule, in [0, 1]; the run has ended at 1.
    share: float = 0.0

    @property
    def promised_seconds(self) -> float:
        """Total seconds of training."""
        return SECONDS_PER_MINUTE * self.minutes

    @property
    def seconds_left(self) -> float:
        """Remaining seconds of training."""
        return self.promised_seconds - self.seconds

    def at_end(self) -> "Timing":
        """Return the timing at the end of the run, including the last checkpoint."""
        return self.model_copy(update={"seconds": self.promised_seconds, "share": 1.0})


class Trained(Protocol):
    """The progress recorded in a checkpoint."""

    step: int
    timing: Timing | None


@dataclass(frozen=True)
class Duration:
    """The number of steps of a run, or its time limit with the elapsed time."""

    # Total steps. With a time limit, only the schedule uses them, to scale its warmup.
    steps: int
    # None if the run has no time limit.
    timing: Timing | None = None

    @classmethod
    def of(cls, train: Train) -> Self:
        """Return the duration of a new run."""
        return cls(train.steps, None if train.minutes is None else Timing(minutes=train.minutes))

    @classmethod
    def resolve(cls, requested: Train, recorded: Train | None, checkpoint: Trained) -> Self:
        """Return the duration of a resumed run.

        - `requested`: the training settings.
        - `recorded`: the training settings of the run in the folder; None if there is none.
        - `checkpoint`: the facts of the checkpoint to resume from.

        Raise UserError if the run has trained for longer already, or would ignore a requested setting.
        """
        # A run cannot switch between steps and minutes, because its schedule is a function of one of them.
        if recorded and (recorded.minutes is None) != (requested.minutes is None):
            given, other = ("steps", "minutes") if recorded.minutes is None else ("minutes", "steps")
            raise UserError(
                f"this run's duration is set by train.{given}, which cannot change to train.{other}: set "
                f"train.{given}, or start a new run from a checkpoint with --from STEP --out NEW"
            )
        if requested.minutes is None:
            if checkpoint.step > requested.steps:
                raise UserError(
                    f"train.steps={requested.steps}, but {checkpoint.step} steps are trained already: set train.steps "
                    f"to {checkpoint.step} or more"
                )
            return cls(requested.steps)
        if recorded and recorded.steps != requested.steps:
            raise UserError(
                f"train.steps={requested.steps} has no effect in a run that ends after "
                f"train.minutes={requested.minutes:.4g}: set train.minutes"
            )

        # Continue from the checkpoint's time. Changed minutes stretch the schedule.
        trained = checkpoint.timing or Timing(minutes=requested.minutes)
        if trained.minutes == requested.minutes:
            return cls(requested.steps, trained)
        stretched = Timing(minutes=requested.minutes, seconds=trained.seconds)
        if stretched.seconds_left < 0:
            minutes_done = minutes_text(trained.seconds / SECONDS_PER_MINUTE)
            raise UserError(
                f"train.minutes={requested.minutes:.4g}, but {minutes_done} are trained already: increase train.minutes"
            )
        share = trained.seconds / stretched.promised_seconds
        return cls(requested.steps, stretched.model_copy(update={"share": share}))

    def is_over(self, step: int) -> bool:
        """Whether no step is left after `step` steps."""
        return step >= self.steps if self.timing is None else self.timing.share >= 1

    def progress(self, step: int) -> float:
        """Return the completed fraction of the training after `step` steps, in [0, 1]."""
        if self.timing is None:
            return step / self.steps
        return min(1.0, self.timing.seconds / self.timing.promised_seconds)

    def rate_factor(self, schedule: LearningRateSchedule, step: int) -> float:
        """Return the factor of the learning rate for the update after `step` steps."""
        if self.timing is None:
            return schedule(step, self.steps)
        return schedule(self.timing.share * self.steps, self.steps)


class Clock:
    """The clock of a run with a time limit."""

    def __init__(self, timing: Timing, began: float, wall_clock: stopwatch.Clock | None = None) -> None:
        """Continue from a timing. `began` is the time of `wall_clock` at the start of the command."""
        self.timing = timing
        self.wall_clock = wall_clock or stopwatch.wall_clock
        # The time at which an uninterrupted training would have begun.
        self.origin = began - timing.seconds
        # The duration of the last checkpoint.
        self.save_seconds = 0.0
        self.step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.last_seconds: float | None = None
        # The seconds before the first step if no time was left for steps, else None.
        self.late_seconds: float | None = None

    def seconds(self) -> float:
        """Return the elapsed seconds of training."""
        return self.wall_clock() - self.origin

    def note_save(self, began: float) -> None:
        """Record the duration of a checkpoint that began at `began` seconds. Called by the thread that wrote it."""
        self.save_seconds = self.seconds() - began

    def read(self) -> Timing:
        """Read the clock before a step and return the timing. If its share is 1, this step is the last."""
        seconds = self.seconds()
        # The time before the first reading is not a step.
        previous = seconds
        if self.last_seconds is not None:
            previous = self.last_seconds
            self.step_seconds.append(seconds - previous)
        elapsed = seconds - previous
        step_seconds = median(self.step_seconds or [0.0])
        seconds_for_steps = self.timing.promised_seconds - self.save_seconds
        # The time left for steps at the last reading.
        left_before = seconds_for_steps - step_seconds - previous

        # Make this step the last if the next one would exceed the limit.
        if seconds + 2 * step_seconds > seconds_for_steps or elapsed >= left_before:
            if self.last_seconds is None:
                self.late_seconds = seconds - self.timing.seconds
            self.timing = self.timing.at_end()
            return self.timing

        share = self.timing.share + (1 - self.timing.share) * elapsed / left_before
        self.last_seconds = seconds
        self.timing = self.timing.model_copy(update={"seconds": seconds, "share": share})
        return self.timing
