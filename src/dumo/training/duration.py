"""How long a run trains: by its steps, or by the clock.

`train.steps` and `train.minutes` are totals: the same command typed again, also by a restart of torchrun or Slurm,
continues to that total. A run with `train.minutes` ends by the clock. Its learning rate falls with time, and its number
of steps is not known before it ends.

`Duration.of` says how long a run trains that begins, `Duration.resolve` one that resumes. `Clock.read` gives the
`Timing` of a run by the clock before each step, on rank 0, whose clock counts for all ranks. `Timing` is part of a
checkpoint, so a resumed run takes its schedule from there alone.

The learning rate of a run by the clock follows the share s of its time, which grows from 0 to 1. With `left` the
seconds that were left for steps, dt seconds since the last reading give

    s' = s + (1 - s) dt / left,

which is linear in time. It does not jump where a resumed command takes time to begin, nor where a checkpoint turns out
to take longer. Other minutes stretch the schedule: the share is then the time that was trained, divided by them.

The clock of a command runs from where it is typed to its last line, without the time that encoding images takes. Only
checkpoints record the time: a run that is stopped before its first one has all of its minutes again. The first
checkpoint comes early (FIRST_SAVE_SHARE), to measure how long one takes: from then on time is left for the last one.
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
# The median of this many steps is how long a step takes.
_RECENT_STEPS = 5
# The share of the time after which a command saves for the first time.
FIRST_SAVE_SHARE = 0.1


class Timing(BaseModel):
    """How far a run by the clock is, as read before the last step."""

    model_config = ConfigDict(frozen=True)

    # Minutes of training in all: `train.minutes`, as it was when the share was measured.
    minutes: float
    # Seconds of these that are over, up to the last step.
    seconds: float = 0.0
    # The share of the schedule that is over, in [0, 1]; 1: the run has ended.
    share: float = 0.0

    @property
    def promised_seconds(self) -> float:
        """Seconds of training in all."""
        return SECONDS_PER_MINUTE * self.minutes

    @property
    def seconds_left(self) -> float:
        """Seconds of training that are not over."""
        return self.promised_seconds - self.seconds

    def at_end(self) -> "Timing":
        """The timing of the run when it ends: what the last checkpoint takes counts as over, too."""
        return self.model_copy(update={"seconds": self.promised_seconds, "share": 1.0})


class Trained(Protocol):
    """What a checkpoint says of the training up to it."""

    step: int
    timing: Timing | None


@dataclass(frozen=True)
class Duration:
    """How long a run trains, and how far it is by the clock."""

    # Steps in all. Of a run by the clock, the steps that its schedule counts its warmup in.
    steps: int
    # None: the run ends by its steps.
    timing: Timing | None = None

    @classmethod
    def of(cls, train: Train) -> Self:
        """The duration of a run that begins."""
        return cls(train.steps, None if train.minutes is None else Timing(minutes=train.minutes))

    @classmethod
    def resolve(cls, requested: Train, recorded: Train | None, checkpoint: Trained) -> Self:
        """The duration of a run that resumes.

        - `requested`: how to train it.
        - `recorded`: how the run in the folder was to be trained; None: the folder holds none.
        - `checkpoint`: the facts of the checkpoint to resume from.

        Raises UserError if the run has trained for longer, or would not read what is requested.
        """
        # A run ends by its steps or by the clock from its beginning on: its schedule is a function of one of them.
        if recorded and (recorded.minutes is None) != (requested.minutes is None):
            given, other = ("steps", "minutes") if recorded.minutes is None else ("minutes", "steps")
            raise UserError(
                f"the run ends by train.{given}, so it cannot be given train.{other} now: set train.{given}, or begin "
                "a new run from its checkpoint by --from STEP --out NEW"
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
                f"train.steps={requested.steps} of a run that ends after train.minutes={requested.minutes:.4g}, "
                "whatever its steps: set train.minutes"
            )

        # The schedule is a function of the checkpoint's time alone. Other minutes stretch it.
        trained = checkpoint.timing or Timing(minutes=requested.minutes)
        if trained.minutes == requested.minutes:
            return cls(requested.steps, trained)
        stretched = Timing(minutes=requested.minutes, seconds=trained.seconds)
        if stretched.seconds_left < 0:
            minutes_done = minutes_text(trained.seconds / SECONDS_PER_MINUTE)
            raise UserError(
                f"train.minutes={requested.minutes:.4g}, but {minutes_done} are trained already: set train.minutes to "
                "more"
            )
        share = trained.seconds / stretched.promised_seconds
        return cls(requested.steps, stretched.model_copy(update={"share": share}))

    def is_over(self, step: int) -> bool:
        """Whether no step is left after `step` steps."""
        return step >= self.steps if self.timing is None else self.timing.share >= 1

    def progress(self, step: int) -> float:
        """How much of the training is over after `step` steps, in [0, 1]."""
        if self.timing is None:
            return step / self.steps
        return min(1.0, self.timing.seconds / self.timing.promised_seconds)

    def rate_factor(self, schedule: LearningRateSchedule, step: int) -> float:
        """The factor of the learning rate for the update after `step` steps."""
        if self.timing is None:
            return schedule(step, self.steps)
        return schedule(self.timing.share * self.steps, self.steps)


class Clock:
    """Reads the clock of a run that ends by it."""

    def __init__(self, timing: Timing, began: float, wall_clock: stopwatch.Clock | None = None) -> None:
        """Continue from a timing, by a clock that read `began` seconds when the command began."""
        self.timing = timing
        self.wall_clock = wall_clock or stopwatch.wall_clock
        # What the clock would have read when the training began.
        self.origin = began - timing.seconds
        # How long a checkpoint took the last time.
        self.save_seconds = 0.0
        self.step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.last_seconds: float | None = None
        # How long the command took up to its first step, if that left no time for steps; None: there was time.
        self.late_seconds: float | None = None

    def seconds(self) -> float:
        """Seconds of training up to now."""
        return self.wall_clock() - self.origin

    def note_save(self, began: float) -> None:
        """Note that a checkpoint, which began at these `seconds`, is written. The thread that writes it calls this."""
        self.save_seconds = self.seconds() - began

    def read(self) -> Timing:
        """Read the clock before a step and return the timing; share 1 means that the step about to run is the last."""
        seconds = self.seconds()
        # What came before the first reading was no step.
        previous = seconds
        if self.last_seconds is not None:
            previous = self.last_seconds
            self.step_seconds.append(seconds - previous)
        elapsed = seconds - previous
        step_seconds = median(self.step_seconds or [0.0])
        seconds_for_steps = self.timing.promised_seconds - self.save_seconds
        # What was left for steps at the last reading.
        left_before = seconds_for_steps - step_seconds - previous

        # End if this step and the next one would end late.
        if seconds + 2 * step_seconds > seconds_for_steps or elapsed >= left_before:
            if self.last_seconds is None:
                self.late_seconds = seconds - self.timing.seconds
            self.timing = self.timing.at_end()
            return self.timing

        share = self.timing.share + (1 - self.timing.share) * elapsed / left_before
        self.last_seconds = seconds
        self.timing = self.timing.model_copy(update={"seconds": seconds, "share": share})
        return self.timing
