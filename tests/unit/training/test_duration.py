"""A training that ends by the clock takes the minutes that it was given, and its rate has fallen by then."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dumo.training.checkpoint import Facts, Listing
from dumo.training.duration import Clock, Duration, Timing
from dumo.training.metrics import StepMetrics
from dumo.training.schedule import WSD, Cosine, LearningRateSchedule
from dumo.training.settings import Train
from dumo.training.state import State, begin
from dumo.types import Terms
from unit.training.toy import Small, run

Pace = Callable[[float], float]  # seconds of the next step, by those that are over


class WallClock:
    """Goes on when it is told to."""

    now = 1000.0  # from any beginning

    def __call__(self) -> float:
        return self.now


@dataclass
class Progress:
    """How far a training is, as a checkpoint says it."""

    step: int = 0
    timing: Timing | None = None


class Machine:
    """Makes the steps of a training at a pace, and keeps the rate of each, and when it was done."""

    def __init__(self, pace: Pace) -> None:
        self.clock = WallClock()
        self.pace = pace
        self.rates: list[float] = []
        self.seconds: list[float] = []

    def train(self, spec: Train, at: Progress, last: float = float("inf"), prepare: float = 0.0) -> Progress:
        """Open it, and train until it is over, or until the clock has gone on by `last` seconds, as the loop does.

        `prepare` seconds go by before the first step.
        """
        began = self.clock.now
        duration = Duration.resolve(spec, spec, at) if at.step else Duration.of(spec)
        assert duration.timing is not None
        clock = Clock(duration.timing, began, self.clock)
        self.clock.now += prepare
        step = at.step
        while not duration.is_over(step) and self.clock.now - began < last:
            read = clock.read()
            self.rates.append(duration.rate_factor(spec.schedule, step))
            self.clock.now += self.pace(self.clock.now - 1000)
            self.seconds.append(self.clock.now - 1000)
            duration = replace(duration, timing=read)
            step += 1
        return Progress(step, duration.timing)


def timed(minutes: float = 2, schedule: LearningRateSchedule | None = None) -> Train:
    """A spec whose number of steps is a guess, and wrong."""
    schedule = schedule or Cosine()
    return Train.model_validate({"steps": 77, "batch": 3, "minutes": minutes, "schedule": schedule, "ema": ()})


PACES: dict[str, Pace] = {
    "even": lambda now: 0.5,
    "slow in the middle": lambda now: 1.0 if now > 60 else 0.5,
    "fast in the middle": lambda now: 0.25 if now > 60 else 0.5,
    "busy for a while": lambda now: 2.0 if 30 < now < 60 else 0.5,
    "few steps": lambda now: 5.0,
}


@pytest.mark.parametrize("schedule", [Cosine(warmup=7), WSD(warmup=7)], ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("pace", PACES.values(), ids=PACES)
def test_it_ends_when_it_said_with_its_rate_down(pace: Pace, schedule: LearningRateSchedule) -> None:
    machine = Machine(pace)
    spec = timed(schedule=schedule)
    end = machine.train(spec, Progress())
    assert 0.9 * 120 <= machine.clock.now - 1000 <= 120
    assert end.timing == Timing(minutes=2, seconds=120, share=1)
    assert machine.rates[0] == schedule(0, 77)
    assert machine.rates[-1] < (0.35 if schedule.kind == "wsd" else 0.05)
    top = machine.rates.index(max(machine.rates))
    assert machine.rates[top:] == sorted(machine.rates[top:], reverse=True)


def test_the_share_is_that_of_time() -> None:
    machine = Machine(PACES["slow in the middle"])
    spec = timed()
    machine.train(spec, Progress())
    middle = next(i for i, seconds in enumerate(machine.seconds) if seconds >= 60)
    assert machine.rates[middle] == pytest.approx(0.5, abs=0.02)


def test_stopped_and_gone_on_twice_it_takes_what_was_promised() -> None:
    machine = Machine(lambda now: 0.5)
    stopped = machine.train(timed(), Progress(), last=50)
    assert machine.clock.now - 1000 == 50
    ended = machine.train(timed(), stopped, prepare=10)  # 70 seconds are left, its opening among them
    assert machine.clock.now - 1000 == pytest.approx(120, abs=2)
    assert ended.timing == Timing(minutes=2, seconds=120, share=1)
    last = machine.train(timed(minutes=2 + 1), ended)
    assert machine.clock.now - 1000 == pytest.approx(180, abs=3)
    assert last.timing == Timing(minutes=3, seconds=180, share=1)


def test_the_rate_has_no_jump_where_a_run_goes_on() -> None:
    machine = Machine(lambda now: 0.05)
    spec = timed(minutes=1)
    stopped = machine.train(spec, Progress(), last=20)
    machine.train(spec, stopped, prepare=5)
    largest_jump = max(abs(now - before) for before, now in pairwise(machine.rates))
    assert largest_jump < 0.01


def test_other_minutes_stretch_the_schedule() -> None:
    """The share is a function of the checkpoint and of the minutes, whatever minutes were given in between."""
    spec = timed(minutes=4)
    for minutes, share in ((2, 0.45), (3, 0.31)):
        checkpoint = Progress(60, Timing(minutes=minutes, seconds=60, share=share))
        stretched = Duration.resolve(spec, timed(minutes=minutes), checkpoint)
        assert stretched == Duration(77, Timing(minutes=4, seconds=60, share=0.25))
        assert Duration.resolve(timed(minutes=minutes), spec, checkpoint) == Duration(77, checkpoint.timing)


def test_the_loop_reads_the_clock() -> None:
    """A step has the rate of the reading before, which all ranks have got by then."""
    machine = Machine(PACES["few steps"])
    expected = machine.train(timed(), Progress())
    clock = WallClock()
    spec = timed()
    state = begin(Small(), spec)
    timing = state.duration.timing
    assert timing == Timing(minutes=2)
    rates: list[float] = []

    def step(state: State, metrics: StepMetrics) -> None:
        clock.now += 5.0
        rates.append(metrics.lr / spec.optimizer.lr)

    run(state, spec, after=[step], read_clock=Clock(timing, clock.now, clock).read)
    assert (state.step, state.duration.timing) == (expected.step, expected.timing)
    assert rates == pytest.approx(machine.rates, abs=1e-6)


@pytest.mark.parametrize("is_over", [False, True])
def test_all_ranks_take_the_time_of_the_first(is_over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is agreed is a mean over three ranks, of which the others have clocks of their own."""
    first = Timing(minutes=2, seconds=30.5, share=0.25)
    if is_over:
        first = first.at_end()
    tables: list[Tensor] = []

    def measured(timing: Timing) -> Timing | None:
        loss = torch.ones(4)
        terms = Terms(loss, {"v": loss})
        return StepMetrics.reduce(torch.rand(4), terms, loss.mean(), step=1, images=4, lr=1.0, timing=timing).timing

    def mean(table: Tensor) -> Tensor:
        tables.append(table)
        return (table + tables[0] + table) / 3

    monkeypatch.setattr("dumo.training.metrics.dist.mean", mean)
    monkeypatch.setattr("dumo.training.metrics.dist.world", lambda: 3)
    measured(first)
    monkeypatch.setattr("dumo.training.metrics.dist.is_main", lambda: False)
    for other in (Timing(minutes=2, seconds=99, share=0.9), Timing(minutes=2).at_end()):
        agreed = measured(other)
        assert agreed is not None
        assert agreed.model_dump() == pytest.approx(first.model_dump())


def test_time_is_left_for_the_last_checkpoint() -> None:
    clock = WallClock()
    countdown = Clock(Timing(minutes=2), clock.now, clock)
    countdown.save_seconds = 9.0
    while countdown.read().share < 1:
        clock.now += 1
    clock.now += 1 + 9
    assert 115 < clock.now - 1000 <= 120


def test_what_is_past_its_time_makes_one_step() -> None:
    machine = Machine(lambda now: 0.5)
    end = machine.train(timed(), Progress(), prepare=130)
    assert end.timing == Timing(minutes=2, seconds=120, share=1)
    assert end.step == 1


def test_without_minutes_nothing_knows_of_time() -> None:
    spec = Train.model_validate({"steps": 9, "batch": 3, "schedule": Cosine(warmup=2)})
    assert Duration.resolve(spec, spec, Progress(4, None)) == Duration(9)
    rates: list[float] = []
    state = run(begin(Small(), spec), spec, after=[lambda _, metrics: rates.append(metrics.lr)])
    assert state.duration == Duration(9)
    assert rates == [spec.optimizer.lr * spec.schedule(step, 9) for step in range(9)]
    assert '"timing"' not in Facts(step=1, images=1).model_dump_json()
    assert "minutes" not in spec.model_dump(exclude_defaults=True)


def test_the_clock_is_part_of_a_checkpoint() -> None:
    about = Facts(step=1, images=1, timing=Timing(minutes=3, seconds=61.5, share=0.4))
    assert Facts.model_validate_json(about.model_dump_json()) == about
    other = about.model_copy(update={"timing": Timing(minutes=3)})
    assert Listing(facts=about, files={}).checksum() != Listing(facts=other, files={}).checksum()


@pytest.mark.parametrize("minutes", [0, -1, float("inf"), float("nan"), 1e7])
def test_minutes_are_some(minutes: float) -> None:
    with pytest.raises(ValidationError):
        timed(minutes=minutes)
