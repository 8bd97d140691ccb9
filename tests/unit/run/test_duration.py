"""A run that ends by the clock, as its folder has it: stopped, gone on with, and given more minutes."""

import json
from pathlib import Path
from threading import Thread

import pytest
import yaml

from dumo.config.spec import Run
from dumo.run.folder import RUN_FILE
from dumo.run.trainer import open_trainer
from dumo.runtime import signals, stopwatch
from dumo.training.checkpoint import Checkpoints
from dumo.training.metrics import StepMetrics
from dumo.training.state import State
from dumo.types import UserError
from trained import After
from unit.run import known
from unit.run.known import Seen, tiny
from unit.training.by_path import latest

TIMED = (
    "train.minutes=1",
    "train.save_every=1000",
    "train.schedule.kind=cosine",
    "train.schedule.warmup=1",
    "train.log_every=1",
)
PACE = 2.5  # seconds of a step


class Clock:
    """Goes on by a step's seconds after each."""

    def __init__(self) -> None:
        self.now = 50.0
        self.last: int | None = None  # the step during which a stop is asked for

    def __call__(self) -> float:
        return self.now

    def step(self, state: State, metrics: StepMetrics) -> None:
        """A hook."""
        self.now += PACE
        if self.last is not None and state.step == self.last - 1:
            signals.received_signal = signals.SIGNALS[0]


class Inline(Thread):
    """Runs at once: a thread would take as long as steps do meanwhile."""

    def start(self) -> None:
        """As `run`."""
        self.run()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of trainings."""
    clock = Clock()
    monkeypatch.setattr(stopwatch, "wall_clock", clock)
    monkeypatch.setattr(signals, "received_signal", None)
    monkeypatch.setattr("dumo.training.checkpoint.Thread", Inline)
    return clock


def train(folder: Path, clock: Clock, run: Run | None = None, *changes: str) -> tuple[list[str], Seen, State]:
    """Train a run, or go on with that of the folder: the lines that were told, the bar, and the state at the end."""
    told: list[str] = []
    seen = Seen()
    opened = open_trainer(folder, run, changes=changes, device="cpu", print_line=told.append, bar=seen)
    with opened as trainer:
        trainer.hooks.append(After(clock.step))
        return told, seen, trainer.train()


def written(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / RUN_FILE).read_text())["train"]


def test_stopped_gone_on_and_given_more_it_takes_the_sum(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    began = clock.now
    run = tiny("moons", *TIMED)

    # Stop it, and resume it.
    clock.last = 9
    with pytest.raises(signals.Stopped):
        train(folder, clock, run)
    assert clock.now - began == pytest.approx(9 * PACE)
    signals.received_signal = clock.last = None
    told, seen, state = train(folder, clock)
    assert clock.now - began == pytest.approx(60, abs=2 * PACE)
    assert "of 1:00 are left, from step 9 on, each of 4 points" in told[0]
    assert seen.titles[-1] == ("training run (seconds)", 60)
    assert seen.ticks[-1] == 60

    # Its schedule is a function of the checkpoint: the number of steps is never written down.
    assert state.step > 20
    assert written(folder)["steps"] == run.train.steps

    # No step is left, and it says what to type.
    bits = known.bits(folder)
    told, _, _ = train(folder, clock)
    assert f"{folder} has trained its 1 minute. For more:  dumo train {folder} minutes=2" in told
    assert known.bits(folder) == bits

    # Give it more, and type the same again after a stop, as torchrun and Slurm do.
    began = clock.now
    clock.last = state.step + 5
    with pytest.raises(signals.Stopped):
        train(folder, clock, None, "train.minutes=1.5")
    assert written(folder)["minutes"] == 1.5
    signals.received_signal = clock.last = None
    _, _, end = train(folder, clock, None, "train.minutes=1.5")
    assert clock.now - began == pytest.approx(30, abs=2 * PACE)
    assert end.duration.timing is not None
    assert (end.duration.timing.seconds, end.duration.timing.share) == (90, 1)

    # Its rate is that of two thirds of the schedule, and falls to the end.
    rates = {row["step"]: row["lr"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    peak = run.train.optimizer.lr
    steps = run.train.steps
    assert rates[state.step + 1] == pytest.approx(peak * run.train.schedule(2 / 3 * steps, steps))
    assert rates[end.step] < 0.05 * peak


@pytest.mark.parametrize("name", ["state.json", "net/00000.safetensors"])
def test_a_kill_in_the_last_checkpoint_does_not_change_the_schedule(name: str, clock: Clock, tmp_path: Path) -> None:
    """The last one is damaged, so the schedule is that of the one before."""
    folder = tmp_path / "run"
    run = tiny("moons", *TIMED, "train.keep=9")
    train(folder, clock, run)
    checkpoints = Checkpoints(folder / "checkpoints")
    before, last = map(checkpoints.read, checkpoints.steps())
    rates = [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    file = last.path / name
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.warns(UserWarning, match=f"using the previous checkpoint {before.path.name}"):
        train(folder, clock)
    again = [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = before.facts.step
    assert again[: step + 1] == rates[: step + 1]
    assert again[step:] == sorted(again[step:], reverse=True)
    assert again[-1] == pytest.approx(rates[-1], abs=0.1 * max(rates))


def test_fewer_minutes_than_were_trained_are_refused(clock: Clock, tmp_path: Path) -> None:
    """As fewer steps are."""
    folder = tmp_path / "run"
    run = tiny("moons", *TIMED)
    train(folder, clock, run)
    train(folder, clock, None, "train.minutes=1.5")
    bits = known.bits(folder)
    with pytest.raises(UserError) as refused:
        train(folder, clock, run)
    assert "train.minutes=1, but 1.5 minutes are trained already" in str(refused.value)
    assert known.bits(folder) == bits
    assert written(folder)["minutes"] == 1.5


def test_a_run_that_has_ended_is_not_refused_by_a_rounding(clock: Clock, tmp_path: Path) -> None:
    minutes = 0.54
    assert 60 * minutes / 60 > minutes
    run = tiny("moons", *TIMED, f"train.minutes={minutes}")
    steps = [train(tmp_path / "run", clock, run)[2].step for _ in range(2)]
    assert steps[0] == steps[1]


def test_a_command_whose_time_goes_by_before_its_first_step_says_so(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    clock.last = 9
    with pytest.raises(signals.Stopped):
        train(folder, clock, tiny("moons", *TIMED))
    signals.received_signal = clock.last = None
    told: list[str] = []
    with open_trainer(folder, device="cpu", print_line=told.append) as trainer:
        clock.now += 45  # of the 37.5 seconds that are left
        trainer.hooks.append(After(clock.step))
        state = trainer.train()
    assert state.step == 10
    assert told[-1].startswith("startup took 0:45, so there was only time for one step")
    told, seen, _ = train(folder, clock)
    assert not any("no time" in line for line in told)
    assert seen.notes == ["no step is left"]
    told, seen, _ = train(folder, clock, None, "train.minutes=2")
    assert not any("no time" in line for line in told)
    assert seen.notes[0] == "the first step"


def test_steps_of_a_run_that_ends_by_the_clock_are_refused(clock: Clock, tmp_path: Path) -> None:
    """They would only change its warmup; and a run of steps cannot be given minutes."""
    folder = tmp_path / "run"
    train(folder, clock, tiny("moons", *TIMED))
    with pytest.raises(UserError, match="has no effect in a run"):
        train(folder, clock, None, "train.steps=100")
    with pytest.raises(UserError, match="duration is set by"):
        train(folder, clock, None, "train.steps=100", "train.minutes=null")
    train(tmp_path / "steps", clock, tiny("moons"))
    with pytest.raises(UserError, match="duration is set by"):
        train(tmp_path / "steps", clock, None, "train.minutes=2")


def test_a_first_checkpoint_comes_early_and_room_is_left_for_the_last(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpoints._write

    def slow(*given: object) -> None:
        clock.now += 8
        write(*given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Checkpoints, "_write", slow)
    began = clock.now
    _, _, state = train(tmp_path / "run", clock, tiny("moons", *TIMED, "train.keep=9"))
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert len(saved) == 2
    assert int(saved[0][-8:]) <= 0.3 * state.step
    assert 60 - 2 * PACE <= clock.now - began <= 60


def test_a_recipe_that_ends_by_the_clock_is_typed_again(clock: Clock, tmp_path: Path) -> None:
    run = tiny("moons", *TIMED)
    _, _, state = train(tmp_path / "run", clock, run)
    _, _, again = train(tmp_path / "run", clock, run)
    assert again.step == state.step


def test_without_minutes_a_folder_says_nothing_of_time(clock: Clock, tmp_path: Path) -> None:
    train(tmp_path / "run", clock, tiny())
    assert "minutes:" not in (tmp_path / "run" / RUN_FILE).read_text().replace("save_minutes:", "")
    last = latest(tmp_path / "run/checkpoints")
    assert last is not None
    assert "timing" not in json.loads((last / "state.json").read_text())["facts"]
