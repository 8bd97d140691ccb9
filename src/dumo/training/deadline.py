"""A run that ends by the clock (`train.minutes`): its learning rate falls with time, and its steps are not fixed.

`Timing` says how far such a run is. It is part of the state, so a resumed run goes on with what is left. `begin_timing`
makes it when a run is opened, and a `Countdown` makes the next one before each step: on rank 0, whose clock counts for
all ranks.

The time of a run is that of its commands. One counts from where it is typed, or where its plan is accepted, up to its
last line, with all that it does besides its steps. A checkpoint comes early, so that it is known how long one takes;
that is left for the last one, and so are a score and a sheet of samples where they are due; near the end one that has
not been timed is not begun. Before the first step data may take a part of the time to be prepared, as long as
`PreparationTime` says. Time is noted in checkpoints alone: where a run is stopped before its first step, the next
command has all of its minutes.

The rate follows the share s of a stretch, which grows from 0 to 1. Of the seconds that were `left` for steps, those dt
since the last reading take

    s' = s + (1 - s) dt / left,

which is linear in time. It does not jump where a resumed command takes time to begin, nor where a checkpoint is found
to take longer. A run that is given more minutes begins another stretch: its rate rises from what it was to the full one
within the share RISE, and falls again.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from statistics import median

from pydantic import BaseModel, ConfigDict

from dumo.runtime.stopwatch import Clock, wall_clock
from dumo.training.optim import LearningRateSchedule

SECONDS_PER_MINUTE = 60.0
RISE = 0.05  # of a stretch: ours, measured (docs/log.md)
FIRST_SAVE = 0.1  # the share of a stretch after which a command saves for the first time: ours
RECENT_STEPS = 5  # whose median is how long a step takes: ours
PLANNED_SHARE = 0.5  # of a command's time, that a plan lets its data take to be prepared: ours
MAX_SHARE = 0.75  # that they may take on a machine which is slower than it was planned on: ours
UNKNOWN_SHARE = 0.1  # of a command's time, that work which it has not timed yet is taken to need: ours
SAVE = "save"  # kinds of work: to write a checkpoint, to judge samples, to draw sheets
JUDGE = "judge"
DRAW = "draw"


class Timing(BaseModel):
    """How far a run that ends by the clock is, after a step."""

    model_config = ConfigDict(frozen=True)

    minutes: float  # of training in all: `train.minutes`, as it was when the stretch began
    seconds: float = 0.0  # of these that are over, up to the last step
    share: float = 0.0  # of the stretch that is over, in [0, 1]; 1: the run has ended
    start: float | None = None  # the factor of the rate where the stretch began; None: the run began with it

    @property
    def promised_seconds(self) -> float:
        """Seconds of training in all."""
        return SECONDS_PER_MINUTE * self.minutes

    @property
    def seconds_left(self) -> float:
        """Seconds of training that are not over."""
        return self.promised_seconds - self.seconds

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self.share >= 1

    @property
    def progress(self) -> float:
        """How much of the whole training is over, in [0, 1]."""
        return min(1.0, self.seconds / self.promised_seconds)

    def ended(self) -> "Timing":
        """The timing at the end: what the last checkpoint takes counts as over, too."""
        return self.model_copy(update={"seconds": self.promised_seconds, "share": 1.0})

    def factor(self, schedule: LearningRateSchedule, steps: int) -> float:
        """The factor of the learning rate: that of a schedule over `steps` steps, of which the share is over."""
        if self.start is None:
            return schedule(self.share * steps, steps)
        rise = self.start + (1 - self.start) * min(1.0, self.share / RISE)
        share_of_fall = max(0.0, self.share - RISE) / (1 - RISE)
        return rise * schedule.model_copy(update={"warmup": 0})(share_of_fall * steps, steps)


def begin_timing(minutes: float | None, timing: Timing | None, factor: float | None) -> Timing | None:
    """The timing of a run that is opened to train for these minutes in all; None where its steps are fixed.

    `timing` is its checkpoint's, and `factor` that of the rate there; each None where there is none. The stretch of the
    checkpoint goes on, unless the run has been given other minutes since.
    """
    if minutes is None:
        return None
    if timing is None:
        return Timing(minutes=minutes, start=factor)
    if timing.minutes == minutes:
        return timing
    return Timing(minutes=minutes, seconds=timing.seconds, start=factor)


@dataclass(frozen=True)
class PreparationTime:
    """How long a command may prepare the data of a run that ends by the clock, so that there is time for steps."""

    began: float  # by the clock, when the command began
    seconds_left: float  # of training, by then
    clock: Clock = wall_clock

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return self.clock() - self.began

    @property
    def minutes_left(self) -> int:
        """Minutes of training that were left when the command began, rounded up."""
        return ceil(self.seconds_left / SECONDS_PER_MINUTE)

    @property
    def is_over(self) -> bool:
        """Whether no more time may be spent on it."""
        return self.seconds >= MAX_SHARE * self.seconds_left


def minutes_to_prepare(seconds: float) -> int:
    """The minutes to give a command whose data take these seconds to be prepared."""
    return ceil(seconds / (PLANNED_SHARE * SECONDS_PER_MINUTE))


class Countdown:
    """Reads the clock of a run that ends by it."""

    def __init__(
        self,
        timing: Timing,
        began: float,
        clock: Clock = wall_clock,
        work_after: Callable[[int], Iterable[str]] = lambda step: (),
    ) -> None:
        """Count on from a timing, by a clock that read `began` when the command began.

        `work_after(step)` names what is done after a step besides the next one, as `note` calls it.
        """
        self.timing = timing
        self.clock = clock
        self.origin = began - timing.seconds
        self.unknown_seconds = UNKNOWN_SHARE * timing.seconds_left  # of work that has not been timed yet
        self.work_after = work_after
        self.work_seconds: dict[str, float] = {}  # that each kind of work took, the last time
        self.step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self.last_seconds: float | None = None  # at the last reading
        self.late_seconds: float | None = None  # of the command, that had left no time for a step when the first began

    def seconds(self) -> float:
        """Seconds of training up to now."""
        return self.clock() - self.origin

    def note(self, work: str, began: float) -> None:
        """Note that a kind of work is done, which began at these `seconds`. A thread may have done it meanwhile."""
        self.work_seconds[work] = self.seconds() - began

    def _seconds_of(self, work: str) -> float:
        """Seconds that a kind of work takes: as the last time, or a share of the command's where there was none."""
        return self.work_seconds.get(work, self.unknown_seconds)

    def read(self, step: int) -> Timing:
        """The timing before the step that follows `step` done ones. It is over where there is no time for another."""
        seconds = self.seconds()
        elapsed = 0.0
        if self.last_seconds is not None:  # what came before the first reading was no step
            elapsed = seconds - self.last_seconds
            self.step_seconds.append(elapsed)
        step_seconds = median(self.step_seconds or [0.0])
        seconds_for_steps = self.timing.promised_seconds - self.work_seconds.get(SAVE, 0.0)

        # whether this step, the next one and what is due after each would take too long
        work_seconds = 0.0
        for coming_step in (step + 1, step + 2):
            work_seconds += sum(map(self._seconds_of, self.work_after(coming_step)))
        left = seconds_for_steps - step_seconds - (seconds - elapsed)
        if seconds + 2 * step_seconds + work_seconds > seconds_for_steps or elapsed >= left:
            if self.last_seconds is None:
                self.late_seconds = seconds - self.timing.seconds
            self.timing = self.timing.ended()
            return self.timing

        share = self.timing.share + (1 - self.timing.share) * elapsed / left
        self.last_seconds = seconds
        self.timing = self.timing.model_copy(update={"seconds": seconds, "share": share})
        return self.timing
