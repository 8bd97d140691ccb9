"""A run that ends by the clock, as its folder has it: stopped, gone on with, and given more minutes."""

import json
from pathlib import Path

import pytest
import yaml

from dumo.config.spec import Run
from dumo.run.folder import RUN_FILE
from dumo.run.job import open_job
from dumo.run.train import train_job
from dumo.runtime import signals, stopwatch
from dumo.training.loop import Every
from dumo.training.manifest import Checkpoints
from dumo.training.record import Record
from dumo.training.saver import Saver
from dumo.training.state import State
from dumo.types import UserError
from unit.run import known
from unit.run.known import Seen, noted, tiny
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

    def step(self, state: State, record: Record) -> None:
        """A hook."""
        self.now += PACE
        if self.last is not None and state.step == self.last - 1:
            signals.received_signal = signals.SIGNALS[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of trainings."""
    clock = Clock()
    monkeypatch.setattr(stopwatch, "wall_clock", clock)
    monkeypatch.setattr(signals, "received_signal", None)
    monkeypatch.setattr(Saver, "start", lambda saver, work: work())  # a thread would take as long as steps do meanwhile
    return clock


def train(
    folder: Path, clock: Clock, run: Run | None = None, *changes: str, minutes: float | None = None
) -> tuple[list[str], Seen, State]:
    """Train a run, or go on with that of the folder: the lines that were told, the bar, and the state at the end."""
    told: list[str] = []
    seen = Seen()
    opened = open_job(folder, run, changes=changes, device="cpu", tell=told.append, minutes=minutes)
    with opened as job:
        return told, seen, train_job(job, seen, [Every(1, clock.step)])


def written(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / RUN_FILE).read_text())["train"]


def test_stopped_gone_on_and_given_more_it_takes_the_sum(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    began = clock.now
    run = tiny("moons", *TIMED)

    # stopped, and gone on with
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

    # its steps are those that it made
    assert state.step > 20
    assert written(folder)["steps"] == state.step
    last = latest(folder / "checkpoints")
    assert last is not None
    assert yaml.safe_load((last / "spec.yaml").read_text())["train"]["steps"] == state.step

    # there is no more to do, and it says what there is to type
    bits = known.bits(folder)
    told, _, _ = train(folder, clock)
    assert f"{folder} has trained its 1 minute. For more:  dumo train {folder} --minutes 1" in told
    assert known.bits(folder) == bits

    # more, and a command that is typed again after it was stopped
    began = clock.now
    clock.last = state.step + 5
    with pytest.raises(signals.Stopped):
        train(folder, clock, minutes=0.5)
    assert written(folder)["minutes"] == 1.5
    assert noted(folder)[-1].field == "train.minutes"
    signals.received_signal = clock.last = None
    _, _, end = train(folder, clock)
    assert clock.now - began == pytest.approx(30, abs=2 * PACE)
    assert end.timing is not None
    assert (end.timing.seconds, end.timing.share) == (90, 1)

    # its rate rises from where it was, and falls again
    rates = {row["step"]: row["lr"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    peak = run.train.optimizer.lr
    assert rates[state.step + 1] == 0
    assert max(rates[step] for step in rates if step > state.step) > 0.8 * peak
    assert rates[end.step] < 0.2 * peak


def test_a_restart_adds_no_minutes(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that Slurm requeues has the words that it had, and ends when it was to end."""
    folder = tmp_path / "run"
    _, _, state = train(folder, clock, tiny("moons", *TIMED))
    clock.last = state.step + 5
    with pytest.raises(signals.Stopped):
        train(folder, clock, minutes=0.5)
    signals.received_signal = clock.last = None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    told, _, end = train(folder, clock, minutes=0.5)
    assert told[0].startswith(f"{folder} has obeyed --minutes 0.5 already")
    assert written(folder)["minutes"] == 1.5
    assert end.timing is not None
    assert end.timing.seconds == 90


@pytest.mark.parametrize("name", ["state.json", "net.safetensors"])
def test_minutes_are_added_to_those_of_the_checkpoint_that_is_resumed(name: str, clock: Clock, tmp_path: Path) -> None:
    """The last one is damaged, so it is the one before."""
    folder = tmp_path / "run"
    train(folder, clock, tiny("moons", *TIMED, "train.keep=9"))
    before, last = Checkpoints(folder / "checkpoints").by_step().values()
    file = last.path / name
    file.write_bytes(bytes(file.stat().st_size))
    began = clock.now
    with pytest.warns(UserWarning, match=f"{before.path.name}, before it, is taken"):
        train(folder, clock, minutes=0.5)
    assert clock.now - began == pytest.approx(30, abs=2 * PACE)
    assert before.manifest.timing is not None
    assert written(folder)["minutes"] == pytest.approx(0.5 + before.manifest.timing.seconds / 60)


def test_fewer_minutes_than_were_trained_are_refused(clock: Clock, tmp_path: Path) -> None:
    """As fewer steps are."""
    folder = tmp_path / "run"
    run = tiny("moons", *TIMED)
    train(folder, clock, run)
    train(folder, clock, minutes=0.5)
    bits = known.bits(folder)
    with pytest.raises(UserError) as refused:
        train(folder, clock, run)
    assert f"train.minutes=1, but {folder} has already trained 1.5 minutes" in str(refused.value)
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
    with open_job(folder, device="cpu", tell=told.append) as job:
        clock.now += 45  # of the 37.5 seconds that are left
        state = train_job(job, hooks=[Every(1, clock.step)])
    assert state.step == 10
    assert told[-1] == (
        "it took 0:45 to begin, and no time was left for steps: it made one, and skipped the rest of its learning "
        f"rate's schedule. With enough time:  dumo train {folder} --minutes 2"
    )
    told, seen, _ = train(folder, clock)
    assert not any("no time" in line for line in told)
    assert seen.notes == ["no step is left"]
    told, seen, _ = train(folder, clock, minutes=1)
    assert not any("no time" in line for line in told)
    assert seen.notes[0] == "the first step"


def test_a_command_that_sets_minutes_and_steps_may_be_typed_again(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = (*TIMED, "train.steps=7")
    run = tiny("moons", *changes)
    clock.last = 9
    with pytest.raises(signals.Stopped):
        train(folder, clock, run, *changes)
    signals.received_signal = clock.last = None
    _, _, state = train(folder, clock, run, *changes)
    assert state.step > 20
    assert written(folder)["steps"] == state.step


def test_minutes_and_steps_are_not_both_given_to_a_run(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, clock, tiny("moons"))
    with pytest.raises(UserError):
        train(folder, clock, None, "train.steps=100", minutes=0.5)


def test_steps_of_a_new_run_that_ends_by_the_clock_are_refused(clock: Clock, tmp_path: Path) -> None:
    """As of the settings of another run, which has minutes."""
    folder = tmp_path / "run"
    changes = ("train.steps=100",)
    with pytest.raises(UserError):
        train(folder, clock, tiny("moons", *TIMED, *changes), *changes)
    assert not folder.exists()


def test_a_run_of_steps_goes_on_for_minutes_and_for_steps_again(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, clock, tiny("moons", "train.log_every=1"))
    told, _, _ = train(folder, clock)
    told = [line for line in told if "For more" in line]
    assert f"dumo train {folder} --set train.steps=8" in told[-1]
    assert f"dumo train {folder} --minutes 5" in told[-1]
    began = clock.now
    _, _, state = train(folder, clock, minutes=0.5)
    assert clock.now - began == pytest.approx(30, abs=2 * PACE)
    assert state.timing is not None
    assert state.timing.progress_before == 1
    steps = state.step
    with pytest.raises(UserError):
        train(folder, clock, None, f"train.steps={steps + 2}")
    _, _, state = train(folder, clock, None, "train.minutes=null", f"train.steps={steps + 2}")
    assert (state.step, state.timing) == (steps + 2, None)


def test_a_first_checkpoint_comes_early_and_room_is_left_for_the_last(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dumo.training import checkpoint

    put = checkpoint.save_copy

    def slow(*given: object) -> Path:
        clock.now += 8
        return put(*given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(checkpoint, "save_copy", slow)
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
    assert (again.step, written(tmp_path / "run")["steps"]) == (state.step, state.step)


def test_without_minutes_a_folder_says_nothing_of_time(clock: Clock, tmp_path: Path) -> None:
    train(tmp_path / "run", clock, tiny())
    assert "minutes:" not in (tmp_path / "run" / RUN_FILE).read_text().replace("save_minutes:", "")
    last = latest(tmp_path / "run/checkpoints")
    assert last is not None
    assert "timing" not in json.loads((last / "state.json").read_text())
