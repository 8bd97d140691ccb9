"""A milestone is the weights that were shown after a step: it stays, and a finished run can be opened as it was."""

import shutil
from pathlib import Path

import pytest
import torch

from dumo.config.spec import Run
from dumo.io.tensor_files import load as load_weights
from dumo.report.gallery import trajectories
from dumo.run.weights import build, load_run
from dumo.training import milestone
from dumo.types import UserError
from trained import train
from unit.run import known


def tiny(steps: int, milestones: str, *more: str) -> Run:
    """DuMo on moons, in no time."""
    return known.tiny("moons", "train.keep=1", f"train.steps={steps}", f"train.milestones={milestones}", *more)


def kept(folder: Path) -> dict[int, bytes]:
    """The bytes of the milestones, by step; nothing else lies beside them."""
    files = milestone.milestones(folder / "milestones")
    assert sorted(files.values()) == sorted((folder / "milestones").iterdir())
    return {step: file.read_bytes() for step, file in files.items()}


@pytest.mark.slow
def test_milestones_outlive_the_checkpoints(tmp_path: Path) -> None:
    train(tiny(6, "[0, 3, 4, 99]"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]
    assert list(kept(tmp_path / "run")) == [0, 3, 4]
    train(tiny(4, "[]"), tmp_path / "short")
    assert not (tmp_path / "short/milestones").exists()
    first = load_weights(tmp_path / "short/checkpoints/step-00000004/ema-0.999")
    there = load_weights(tmp_path / "run/milestones/step-00000004.safetensors")
    assert there.keys() == first.keys()
    assert all(torch.equal(there[name], value) for name, value in first.items())


@pytest.mark.slow
def test_the_first_milestone_is_before_training(tmp_path: Path) -> None:
    spec = tiny(2, "[0]", "train.ema=[]")
    train(spec, tmp_path / "run")
    there = load_weights(tmp_path / "run/milestones/step-00000000.safetensors")
    assert all(torch.equal(there[name], value) for name, value in build(spec).state_dict().items())


def test_milestones_that_changed_places_are_no_trajectories(tmp_path: Path) -> None:
    train(tiny(2, "[0, 1]"), tmp_path / "run")
    first, second = (tmp_path / f"run/milestones/step-0000000{step}.safetensors" for step in (0, 1))
    first.rename(tmp_path / "spare")
    second.rename(first)
    (tmp_path / "spare").rename(second)
    with pytest.raises(UserError):
        trajectories(load_run(str(tmp_path / "run"), device="cpu"), nfe=[1], count=1)


@pytest.mark.nightly
def test_stopped_and_resumed_leaves_the_same_milestones(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(tiny(7, "[0, 1, 3, 5, 7]"), whole)
    train(tiny(3, "[0, 1, 3]"), run)
    before = {path: path.stat().st_mtime_ns for path in (run / "milestones").iterdir()}
    train(tiny(7, "[0, 1, 3, 5, 7]"), run)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert kept(run) == kept(whole)
    train(tiny(7, "[0, 1, 3, 5, 7]"), run)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_milestone_where_a_run_stands_is_written_on_resume(tmp_path: Path) -> None:
    train(tiny(2, "[]"), tmp_path / "run")
    train(tiny(2, "[1, 2]"), tmp_path / "run")  # step 1 is over
    assert list(kept(tmp_path / "run")) == [2]


@pytest.mark.nightly
def test_what_is_made_again_replaces_what_was_lost_with_its_checkpoint(tmp_path: Path) -> None:
    """The milestones after the checkpoint are those of the run that went on, not of the one that stopped."""
    run = tmp_path / "run"
    train(tiny(4, "[3]"), run)
    first = kept(run)
    shutil.rmtree(run / "checkpoints")
    (run / "milestones/step-00000003.safetensors").write_bytes(b"of another time")
    (run / "milestones/.step-00000009.safetensors.tmp").write_bytes(b"half")
    train(tiny(4, "[3]"), run)
    assert kept(run) == first


def test_what_a_kill_undid_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    """With other settings, say, the steps that follow lead elsewhere."""
    run = tmp_path / "run"
    train(tiny(4, "[1, 3]", "train.keep=9"), run)
    shutil.rmtree(run / "checkpoints/step-00000004")  # as if killed before it was written
    train(tiny(2, "[1, 3]", "train.keep=9"), run)
    assert list(kept(run)) == [1]


@pytest.mark.slow
def test_an_opened_milestone_says_its_step(tmp_path: Path) -> None:
    train(tiny(6, "[0, 3]", "train.keep=9"), tmp_path / "run")
    file = tmp_path / "run/milestones/step-00000003.safetensors"
    moved = shutil.copy(file, tmp_path / "mine.safetensors")
    for weights in (str(file), str(moved)):
        opened = load_run(str(tmp_path / "run"), weights=weights)
        assert (opened.step, opened.weights) == (3, weights)
        there = load_weights(file)
        assert all(torch.equal(there[name], value) for name, value in opened.net.state_dict().items())
    earlier = tmp_path / "run/checkpoints/step-00000002/net"
    assert load_run(str(tmp_path / "run"), weights=str(earlier)).step == 2
    assert load_run(str(tmp_path / "run")).step == 6


@pytest.mark.slow
def test_a_milestone_is_opened_where_the_checkpoints_are_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(2, "[1]"), run)
    shutil.rmtree(run / "checkpoints")
    file = run / "milestones/step-00000001.safetensors"
    opened = load_run(str(run), weights=str(file))
    assert (opened.step, opened.checkpoint) == (1, None)
    assert all(torch.equal(value, opened.net.state_dict()[name]) for name, value in load_weights(file).items())
    with pytest.raises(UserError):
        load_run(str(run))


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_what_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(2, "[0, 1]"), tmp_path / "run")
    before = kept(tmp_path / "run")

    def fail(path: Path) -> None:
        if "step-" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("dumo.io.file.flush", fail)
    with pytest.raises(OSError, match="No space left"):
        train(tiny(2, "[0, 1, 2]"), tmp_path / "run")
    assert kept(tmp_path / "run") == before
