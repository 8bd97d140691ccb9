"""A training that is left alone: what it skips, when it stops, what it keeps, and how it goes on."""

import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch

from dumo.config.load import load
from dumo.config.place import RUN_FILE
from dumo.config.spec import Run
from dumo.flow.noisy_batch import Draws
from dumo.io import digest, tensor_files
from dumo.run import folder as folders
from dumo.run.folder import CHECKPOINT_MARK, LOCK_FILE
from dumo.run.hooks import SaveCheckpoints
from dumo.run.trainer import Batch, Trainer, open_trainer, require_same_on_all_ranks
from dumo.run.weights import load_run
from dumo.runtime import signals
from dumo.training import agreement, layout, log
from dumo.training.checkpoint import Checkpoints, paths_by_step
from dumo.training.metrics import StepMetrics
from dumo.training.state import Diverged, State, Trend
from dumo.types import UserError
from e2e.shell import call
from trained import After, train
from unit.run import known
from unit.training.sharded import sign

TINY = ("train.batch=8", "train.steps=8", "train.log_every=2", "train.keep=9", "train.schedule.warmup=0")
BAD = 5  # the row of a batch that is spoilt


def tiny(*more: str, name: str = "moons") -> Run:
    """A recipe made small, of eight steps."""
    return known.tiny(name, *TINY, "train.optimizer.lr=0.001", *more)


class Fate:
    """What befalls a training: steps whose batch has a number that is none, and a step during which it is to stop."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.spoilt, self.last = patch, set[int](), 0
        self.train_step = Trainer.train_step
        patch.setattr(Trainer, "train_step", lambda trainer, *args, **more: self.step(trainer, *args, **more))
        patch.setattr(signals, "received_signal", None)

    def comes(self, spoilt: Iterable[int] = (), last: int = 0) -> None:
        """From now on, steps counted from 1."""
        self.spoilt, self.last = set(spoilt), last
        self.patch.setattr(signals, "received_signal", None)

    def step(self, trainer: Trainer, batch: Batch, draws: Draws, **more: Any) -> StepMetrics:  # noqa: ANN401
        """As `Trainer.train_step`."""
        step = trainer.state.step + 1
        if step in self.spoilt:
            batch = [batch[0].clone(), *batch[1:]]
            batch[0][BAD] = torch.nan
        if step == self.last:
            self.patch.setattr(signals, "received_signal", signal.SIGTERM)
        return self.train_step(trainer, batch, draws, **more)


@pytest.fixture
def fate(monkeypatch: pytest.MonkeyPatch) -> Fate:
    return Fate(monkeypatch)


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, with checkpoints of 2, 4, 6 and 8. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "moons"
    train(tiny(), folder)
    return folder


@pytest.fixture
def run(moons: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(moons, tmp_path / "run")


def steps(folder: Path) -> list[int]:
    return [*paths_by_step(folder / "checkpoints")]


@pytest.mark.slow
def test_a_skipped_step_is_logged_with_its_rows(fate: Fate, tmp_path: Path) -> None:
    run, told = tiny("train.steps=4", "train.log_every=4", name="digits"), list[str]()
    fate.comes(spoilt=[3])
    train(run, tmp_path / "run", print_line=told.append)
    skipped, last = log.read_log(tmp_path / "run/metrics.jsonl")
    assert (skipped["step"], skipped["loss"], last["step"]) == (3, None, 4)
    assert "skipped" not in last
    image = int(run.data.open().numbers(2, 8, run.train.seed)[BAD])  # pyright: ignore
    label = int(run.data.open().batch(2, 8, run.train.seed)[1][BAD])
    (row,) = skipped["skipped"]["rows"]
    assert row == {"t": row["t"], "class": label, "rank": 0, "image": image}
    assert skipped["skipped"]["count"] == 1
    (line,) = [line for line in told if line.startswith("step")]
    assert line.startswith("step 3 is skipped: loss, v, u")
    assert line.endswith(f"image {image}, t {row['t']:.3f}")


@pytest.mark.nightly
def test_stopped_between_skipped_steps_it_is_the_same_run(fate: Fate, tmp_path: Path) -> None:
    """The steps that were skipped in a row are counted on."""
    run = tiny("train.save_every=8")
    fate.comes(spoilt=[3, 4])
    train(run, tmp_path / "whole")
    fate.comes(spoilt=[3, 4], last=3)
    with pytest.raises(signals.Stopped) as stopped:
        train(run, tmp_path / "run")
    assert stopped.value.number == signal.SIGTERM
    assert steps(tmp_path / "run") == [3]  # saved within the step
    fate.comes(spoilt=[4])
    train(run, tmp_path / "run")
    assert known.bits(tmp_path / "run") == known.bits(tmp_path / "whole")

    shutil.rmtree(tmp_path / "run")
    fate.comes(spoilt=[3, 4, 5], last=4)
    with pytest.raises(signals.Stopped):
        train(run, tmp_path / "run")
    fate.comes(spoilt=[5])
    with pytest.raises(Diverged, match=r"step 5 diverged: loss.* in 1 of 8 rows.*the last of 3 skipped steps"):
        train(run, tmp_path / "run")
    assert [row["step"] for row in log.read_log(tmp_path / "run/metrics.jsonl")] == [2, 3, 4, 5]


@pytest.mark.slow
def test_asked_to_stop_before_its_first_step_or_in_its_last(fate: Fate, run: Path, tmp_path: Path) -> None:
    """It makes none, or is done."""
    fate.patch.setattr(signals, "received_signal", signal.SIGINT)
    with pytest.raises(signals.Stopped):
        train(tiny("train.steps=10"), run)
    assert steps(run) == [2, 4, 6, 8]
    fate.comes(last=2)
    train(tiny("train.steps=2"), tmp_path / "short")
    assert steps(tmp_path / "short") == [2]


@pytest.mark.nightly
def test_the_command_of_a_run_that_diverged_goes_on(fate: Fate, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fate.comes(spoilt=range(9, 13))
    monkeypatch.chdir(run.parent)
    done = call("train", "run", "train.steps=12")
    assert done.code == 1
    assert "Traceback" not in done.err
    command = done.err.splitlines()[-1].partition("learning rate:  ")[2]
    assert command == "dumo train run --from 8 --out NEW train.optimizer.lr=0.0005"
    fate.comes()
    done = call(*shlex.split(command)[1:], "train.steps=12")
    assert done.code == 0
    assert [row["step"] for row in log.read_log(run.parent / "NEW/metrics.jsonl")] == [10, 12]
    assert load_run(run.parent / "NEW").spec.train.optimizer.lr == 0.0005


def test_ranks_are_asked_for_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[object] = []  # of one rank after the other

    def gather(work: Callable[[], object]) -> list[object]:
        gathered.append(work())
        return gathered

    monkeypatch.setattr(agreement, "gather_results", gather)
    require_same_on_all_ranks(tiny())
    with pytest.raises(UserError):
        require_same_on_all_ranks(tiny("train.batch=16"))


def test_weights_are_not_gathered_where_there_is_no_slope_to_examine(tmp_path: Path) -> None:
    with patch.object(layout, "gather_net", side_effect=AssertionError):
        train(tiny(name="moons-flow-matching"), tmp_path / "run")
    assert steps(tmp_path / "run") == [2, 4, 6, 8]


@pytest.mark.slow
def test_other_data_are_refused(tmp_path: Path) -> None:
    run, folder = tiny("train.steps=2", name="digits"), tmp_path / "run"
    train(run, folder)
    file = folder / RUN_FILE
    now = load("digits").data.open().fingerprint()
    file.write_text(file.read_text().replace(str(now), "x0123"))
    with pytest.raises(UserError, match="fingerprint x0123"):
        train(run, folder)


@pytest.mark.slow
def test_a_checkpoint_with_a_number_that_is_none_is_not_gone_on_from(moons: Path, run: Path) -> None:
    last = run / "checkpoints/step-00000008"
    file = last / "optimizer/00000.safetensors"
    found = safetensors.torch.load_file(file)
    found[name := sorted(found)[0]].view(-1)[0] = torch.nan
    safetensors.torch.save_file(found, file)
    sign(last)
    wrong = rf"step-00000008: optimizer: {name} is not finite: using the previous checkpoint step-00000006"
    with pytest.warns(UserWarning, match=wrong):
        train(tiny(), run)
    assert known.bits(run) == known.bits(moons)  # it was replaced


@pytest.mark.slow
def test_by_the_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = tiny("train.steps=5", "train.save_every=5")
    calls = iter([False, True, False, False, False])
    monkeypatch.setattr(SaveCheckpoints, "is_due_by_clock", lambda *_: next(calls))
    train(run, tmp_path / "run")
    assert steps(tmp_path / "run") == [2, 5]  # in the step that it falls into


@pytest.mark.parametrize(("minutes", "passed", "due"), [("1", 61, True), ("1", 50, False), ("null", 10**9, False)])
def test_what_is_due(minutes: str, passed: int, due: bool, tmp_path: Path) -> None:
    run = tiny(f"train.save_minutes={minutes}")
    with open_trainer(tmp_path / "run", run, device="cpu") as trainer:
        trainer.save_checkpoints.last_saved = time.monotonic() - passed
        assert trainer.save_checkpoints.is_due_by_clock(trainer) == due


@pytest.mark.nightly
def test_a_checkpoint_that_is_written_late_has_the_log_of_its_step(tmp_path: Path, fate: Fate) -> None:
    """A stop waits for it, and what goes on from it is the undisturbed run."""
    behind, write, append, every = Event(), Checkpoints._write, log.append, "train.log_every=1"

    def slow(*given: object) -> None:
        assert behind.wait(30)
        write(*given)  # pyright: ignore[reportArgumentType]

    def logged(file: Path, row: log.Row) -> None:
        append(file, row)
        if row["step"] == 3:
            behind.set()

    folder, said = tmp_path / "run", list[str]()
    fate.comes(last=3)
    with (
        patch.object(Checkpoints, "_write", slow),
        patch.object(log, "append", logged),
        pytest.raises(signals.Stopped),
    ):
        train(tiny(every), folder)
    assert steps(folder) == [2, 3]
    shutil.rmtree(folder / "checkpoints/step-00000003")
    fate.comes()
    train(tiny(every), folder, print_line=said.append)
    assert not [line for line in said if "is not what was logged" in line]
    train(tiny(every), tmp_path / "whole")
    assert known.bits(folder) == known.bits(tmp_path / "whole")


@pytest.mark.slow
def test_what_was_not_written_ends_the_run_at_the_next_step(tmp_path: Path) -> None:
    """Though no checkpoint is due at it."""
    failed, done = Event(), list[int]()

    def fail(*given: object) -> None:
        failed.set()
        raise UserError("the disk is full")

    def pass_by(state: State, metrics: StepMetrics) -> None:
        done.append(state.step)
        if state.step == 4:
            assert failed.wait(30)
            time.sleep(0.1)

    with patch.object(Checkpoints, "_write", fail), pytest.raises(UserError):
        train(tiny("train.save_every=4"), tmp_path / "run", hooks=[After(pass_by)])
    assert done == [1, 2, 3, 4]


@pytest.mark.nightly
def test_without_a_first_checkpoint_a_run_starts_again_and_with_a_lost_one_it_does_not(tmp_path: Path) -> None:
    """The log of both goes on after the step of the first checkpoint."""
    folder, told, stopped = tmp_path / "run", list[str](), Event()

    def fail(*given: object) -> None:
        assert stopped.wait(30)
        raise UserError("the disk is full")

    def stop(state: State, metrics: StepMetrics) -> None:
        if state.step == 5:
            stopped.set()

    late = ("train.save_every=4", "train.log_every=1")
    with patch.object(Checkpoints, "_write", fail), pytest.raises(UserError):
        train(tiny(*late), folder, hooks=[After(stop)])
    train(tiny(*late), folder, print_line=told.append)
    assert f"{folder} has no checkpoint, so it starts again from step 0" in told
    train(tiny(*late), tmp_path / "whole")
    assert known.bits(folder) == known.bits(tmp_path / "whole")
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [CHECKPOINT_MARK]

    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError):
        train(tiny(*late), folder)


@pytest.mark.slow
def test_a_lost_first_checkpoint_of_a_stop_is_missed(fate: Fate, tmp_path: Path) -> None:
    """It lies before the first step that is saved by its number, so the log cannot tell."""
    folder = tmp_path / "run"
    run = tiny("train.save_every=8", "train.log_every=1")
    fate.comes(last=3)
    with pytest.raises(signals.Stopped):
        train(run, folder)
    fate.comes()
    logged = (folder / "metrics.jsonl").read_text()
    (folder / "checkpoints").rename(tmp_path / "lost")
    with pytest.raises(UserError):
        train(run, folder)
    assert (folder / "metrics.jsonl").read_text() == logged
    (tmp_path / "lost").rename(folder / "checkpoints")
    assert train(run, folder).step == 8


def replace_by_another(folder: Path) -> None:
    """As where its disk is unmounted, or another run is begun under its name."""
    folder.rename(folder.with_name("kept"))
    folder.mkdir()
    (folder / RUN_FILE).touch()
    (folder / LOCK_FILE).touch()


AWAY: dict[str, tuple[Callable[[Path], object], list[str] | None]] = {
    "removed": (lambda folder: shutil.rmtree(shutil.copytree(folder, folder.with_name("kept")).with_name("run")), None),
    "renamed": (lambda folder: folder.rename(folder.with_name("kept")), None),
    "replaced": (replace_by_another, [LOCK_FILE, RUN_FILE]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "every"), [*((way, 100) for way in AWAY), ("renamed", 1)])
def test_a_folder_that_goes_away_in_mid_run_ends_it(way: str, every: int, tmp_path: Path) -> None:
    """Nothing is written where it was, and the same command resumes once it is back."""
    folder, (go_away, left) = tmp_path / "run", AWAY[way]
    run = tiny("train.save_every=2", f"train.log_every={every}")

    def away(state: State, metrics: StepMetrics) -> None:
        if state.step == 3:
            wait_for_checkpoint(folder / "checkpoints/step-00000002")
            go_away(folder)

    with pytest.raises(UserError):
        train(run, folder, hooks=[After(away)])
    assert (sorted(path.name for path in folder.iterdir()) if folder.exists() else None) == left
    if left:
        shutil.rmtree(folder)
    (tmp_path / "kept").rename(folder)
    assert train(run, folder).step == 8


@pytest.mark.slow
def test_another_disk_of_a_run_that_goes_away_ends_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that comes to light while a file is written there."""
    disk, write = tmp_path / "disk", Checkpoints._write
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    monkeypatch.setattr(folders, "is_on_other_disk", lambda place, folder: place.name == "checkpoints")

    def go_away(*given: object) -> None:
        write(*given)  # pyright: ignore[reportArgumentType]
        disk.rename(tmp_path / "kept")
        (run / "checkpoints/late").write_bytes(b"")

    monkeypatch.setattr(Checkpoints, "_write", go_away)
    with pytest.raises(UserError):
        train(tiny("train.steps=9"), run)
    assert not disk.exists()


def wait_for_checkpoint(checkpoint: Path) -> None:
    """Until a thread has written it, and noted that."""
    late = time.monotonic() + 30
    while not checkpoint.exists() or not (checkpoint.parents[1] / CHECKPOINT_MARK).exists():
        assert time.monotonic() < late
        time.sleep(0.001)


def test_a_checkpoint_that_goes_while_it_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a training that keeps one."""
    places, load, calls = run / "checkpoints", tensor_files.load_checked, list[Path]()
    (places / "step-00000008").rename(run / "newer")

    def load_late(place: Path) -> dict[str, torch.Tensor]:
        if not calls:
            (run / "newer").rename(places / "step-00000008")
            shutil.rmtree(place.parent)
        calls.append(place)
        return load(place)

    monkeypatch.setattr("dumo.run.weights.load_checked", load_late)
    opened = load_run(str(run))
    assert (opened.step, len(calls)) == (8, 2)
    whole = digest.of_file(opened.file / "00000.safetensors")
    shutil.rmtree(opened.file)  # later still
    assert opened.sha256 == whole
    (places / "step-00000008/state.json").write_text("{")
    for other in (2, 4):
        shutil.rmtree(places / f"step-0000000{other}")
    with pytest.raises(UserError):
        load_run(str(run))  # what is damaged stays damaged


@pytest.mark.slow
@pytest.mark.parametrize("left", [".run.yaml.1", ".metrics.jsonl.7.tmp"])
def test_what_a_kill_left_of_the_first_write_is_no_run(left: str, tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    (folder / left).touch()
    train(tiny("train.steps=2"), folder)
    made = [CHECKPOINT_MARK, "checkpoints", "metrics.jsonl", RUN_FILE, "speed.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == made
    (folder / "checkpoints/.step-00000009.tmp").mkdir()
    (folder / ".evaluation.json.1.tmp").touch()  # another command may be writing it
    train(tiny("train.steps=2"), folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert (folder / ".evaluation.json.1.tmp").exists()


@pytest.mark.slow
def test_the_last_good_checkpoint_stays(run: Path) -> None:
    for n in (6, 8):
        place = run / f"checkpoints/step-0000000{n}"
        sign(place, trend=Trend(level=30.0, lowest=1.0))
    words = r"more than 10 times its lowest, so step-00000004.*dumo train \S+run --from 4"
    with pytest.warns(UserWarning, match=words):
        train(tiny("train.keep=1", "train.optimizer.lr=1e-9", "train.steps=9"), run)
    assert steps(run) == [4, 9]
