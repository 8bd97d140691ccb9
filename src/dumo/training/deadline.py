"""A run that ends by the clock (`train.minutes`): its learning rate falls with time, and its steps are not fixed.

`Timing` says how far such a run is. It is part of the state, so a resumed run continues with what is left. The order of
events in a command, on rank 0, whose clock counts for all ranks:

1. `begin_timing` makes the `Timing` when the run is opened.
2. `Countdown.read` makes the next `Timing` before each step.
3. Other work is timed by `Countdown.note`: checkpoints, scores, sheets of samples. The first checkpoint comes early
   (FIRST_SAVE_SHARE), so that it is known how long one takes: from then on time is left for the last one. Time is also
   left for a score and a sheet that are due, _UNKNOWN_SHARE if none of its kind has been timed yet.

The clock of a command runs from where it is typed, or its plan is accepted, to its last line, without the time that it
takes to encode images to latents. Only checkpoints note the
time: if a run is stopped before its first one, the next command has all of the minutes.

The learning rate follows the share s of a stretch, which grows from 0 to 1. A stretch is the time of a run that is
given one number of minutes. With `left` the seconds that were left for steps, dt seconds since the last reading give

    s' = s + (1 - s) dt / left,

which is linear in time. It does not jump where a resumed command takes time to begin, nor where a checkpoint turns out
to take longer. A run that is given other minutes begins another stretch: its rate rises from what it was to the full
one within RISE_SHARE, and falls again.
"""

from collections import deque
from collections.abc import Callable, Iterable
from math import ceil
from statistics import median

from pydantic import BaseModel, ConfigDict, Field

from dumo.runtime.stopwatch import Clock, wall_clock
from dumo.training.schedule import LearningRateSchedule

SECONDS_PER_MINUTE = 60.0
# all ours
_RECENT_STEPS = 5  # steps, whose median is how long a step takes
# shares of a stretch
RISE_SHARE = 0.05  # after it a second stretch has the full rate: measured (docs/log.md)
FIRST_SAVE_SHARE = 0.1  # after it a command saves for the first time
# shares of a command's time
_PREPARATION_SHARE = 0.5  # a command that is given enough time may take this long to begin
_UNKNOWN_SHARE = 0.1  # a kind of work is taken to need this long until it has been timed
# kinds of work
SAVE = "save"  # write a checkpoint
JUDGE = "judge"  # score samples
DRAW = "draw"  # draw sheets of samples


class Timing(BaseModel):
    """How far a run that ends by the clock is, after a step."""

    model_config = ConfigDict(frozen=True)

    minutes: float  # of training in all: `train.minutes`, as it was when the stretch began
    seconds: float = 0.0  # of these that are over, up to the last step
    share: float = 0.0  # of the stretch that is over, in [0, 1]; 1: the run has ended
    start: float | None = None  # the factor of the rate where the stretch began; None: the run began with it
    # How much of the training was over, by its steps, when the run was first given minutes.
    progress_before: float = Field(default=0.0, exclude_if=lambda progress: progress == 0)

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
        share_of_time = min(1.0, self.seconds / self.promised_seconds)
        return self.progress_before + (1 - self.progress_before) * share_of_time

    def at_end(self) -> "Timing":
        """The timing of the run when it ends: what the last checkpoint takes counts as over, too."""
        return self.model_copy(update={"seconds": self.promised_seconds, "share": 1.0})

    def factor(self, schedule: LearningRateSchedule, steps: int) -> float:
        """The factor of the learning rate: the schedule's, over `steps` steps, after this share of them."""
        if self.start is None:
            return schedule(self.share * steps, steps)
        rise = self.start + (1 - self.start) * min(1.0, self.share / RISE_SHARE)
        share_of_fall = max(0.0, self.share - RISE_SHARE) / (1 - RISE_SHARE)
        return rise * schedule.model_copy(update={"warmup": 0})(share_of_fall * steps, steps)


def begin_timing(
    minutes: float | None, timing: Timing | None, factor: float | None, progress: float = 0.0
) -> Timing | None:
    """The timing of a run that is opened to train for these minutes in all; None where its steps are fixed.

    `timing` is its checkpoint's, and `factor` the factor of the rate there; each is None without a checkpoint. The
    stretch of the checkpoint continues, unless the run has been given other minutes since. `progress` is how much of
    its steps is over, where the checkpoint has no timing.
    """
    if minutes is None:
        return None
    if timing is None:
        return Timing(minutes=minutes, start=factor, progress_before=min(1.0, progress))
    if timing.minutes == minutes:
        return timing
    return Timing(minutes=minutes, seconds=timing.seconds, start=factor, progress_before=timing.progress_before)


def minutes_to_prepare(seconds: float) -> int:
    """The minutes to give a command that takes these seconds to begin."""
    return ceil(seconds / (_PREPARATION_SHARE * SECONDS_PER_MINUTE))


class Countdown:
    """Reads the clock of a run that ends by it."""

    def __init__(
        self,
        timing: Timing,
        began: float,
        clock: Clock = wall_clock,
        work_after: Callable[[int], Iterable[str]] = lambda step: (),
    ) -> None:
        """Continue from a timing, by a clock that read `began` seconds when the command began.

        `work_after(step)` returns the kinds of work that are due after a step: JUDGE, DRAW.
        """
        self.timing = timing
        self.clock = clock
        self.origin = began - timing.seconds  # what the clock would have read when the training began
        self.unknown_seconds = _UNKNOWN_SHARE * timing.seconds_left  # for work that has not been timed yet
        self.work_after = work_after
        self.work_seconds: dict[str, float] = {}  # by kind of work: how long it took the last time
        self.step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.last_seconds: float | None = None  # at the last reading
        # How long the command took up to its first step, if that left no time for steps; None: there was time.
        self.late_seconds: float | None = None

    def seconds(self) -> float:
        """Seconds of training up to now."""
        return self.clock() - self.origin

    def note(self, work: str, began: float) -> None:
        """Note that a kind of work, which began at these `seconds`, has ended. A thread may have done it."""
        self.work_seconds[work] = self.seconds() - began

    def _seconds_of(self, work: str) -> float:
        """Seconds that a kind of work takes: as long as the last time, or `unknown_seconds` before the first."""
        return self.work_seconds.get(work, self.unknown_seconds)

    def read(self, step: int) -> Timing:
        """Read the clock after `step` steps and return the timing; it is over if there is no time for another step."""
        seconds = self.seconds()
        previous = seconds  # of the last reading; what came before the first one was no step
        if self.last_seconds is not None:
            previous = self.last_seconds
            self.step_seconds.append(seconds - previous)
        elapsed = seconds - previous
        step_seconds = median(self.step_seconds or [0.0])
        # for the last checkpoint nothing is left until the first one is written
        seconds_for_steps = self.timing.promised_seconds - self.work_seconds.get(SAVE, 0.0)

        # whether this step, the next one and what is due after each would end late
        work_seconds = 0.0
        for coming_step in (step + 1, step + 2):
            work_seconds += sum(map(self._seconds_of, self.work_after(coming_step)))
        would_end_late = seconds + 2 * step_seconds + work_seconds > seconds_for_steps
        left_before = seconds_for_steps - step_seconds - previous  # what was left for steps at the last reading
        if would_end_late or elapsed >= left_before:
            if self.last_seconds is None:
                self.late_seconds = seconds - self.timing.seconds
            self.timing = self.timing.at_end()
            return self.timing

        share = self.timing.share + (1 - self.timing.share) * elapsed / left_before
        self.last_seconds = seconds
        self.timing = self.timing.model_copy(update={"seconds": seconds, "share": share})
        return self.timing
