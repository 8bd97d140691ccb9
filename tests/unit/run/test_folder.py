"""A folder is one run's: what it holds is compared with what is asked, field by field."""

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dumo.config.difference import config_hash
from dumo.config.load import dump, load, run_of
from dumo.config.place import LOG_FILE, RUN_FILE
from dumo.config.source import parse_text
from dumo.config.spec import Run
from dumo.plan.prepare import prepare
from dumo.run.folder import CHECKPOINT_MARK, LOCK_FILE, RunFolder
from dumo.run.trained import TrainedRun
from dumo.run.trainer import open_trainer
from dumo.run.weights import build, load_run
from dumo.training.state import State
from dumo.types import UserError
from trained import train
from unit.run.known import claim, noted, tiny


def settle(spec: Run, folder: Path) -> None:
    """As training does: claim the folder, then write into it."""
    claim(spec, folder)
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder(folder).write_run(spec)


def test_a_place_is_settled_once(tmp_path: Path) -> None:
    run = tiny()
    settle(run, tmp_path / "a/b")
    file = tmp_path / "a/b" / RUN_FILE
    assert load(str(file)) == run
    settle(tiny("moons", "train.steps=9", "sample.seed=3"), tmp_path / "a/b")
    assert load(str(file)).train.steps == 9
    before = file.read_bytes()
    with pytest.raises(UserError):
        settle(tiny("moons", "net.width=17"), tmp_path / "a/b")
    with pytest.raises(UserError):
        settle(run, tmp_path / "a")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [RUN_FILE]


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    with RunFolder(folder).lock():
        with pytest.raises(UserError):
            settle_held(tiny(), folder)
        RunFolder(folder).write_run(tiny())
    assert [path.name for path in folder.iterdir()] == [RUN_FILE]
    settle_held(tiny(), folder)
    with pytest.raises(UserError):
        settle_held(tiny("moons", "net.width=17"), folder)


def settle_held(spec: Run, folder: Path) -> None:
    with RunFolder(folder).lock():
        claim(spec, folder)
        RunFolder(folder).write_run(spec)


def test_a_folder_held_for_nothing_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "a/b").lock():
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_training_leaves_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    settle_held(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


def test_a_run_that_is_cleared_and_killed_before_its_first_checkpoint_may_begin_again(tmp_path: Path) -> None:
    """Its checkpoints and its log were removed, and the mark of a checkpoint was not."""
    folder = RunFolder(tmp_path)
    folder.write_run(tiny())
    folder.mark_checkpoint_written()
    log_file = tmp_path / LOG_FILE
    log_file.touch()
    with pytest.raises(UserError):
        claim(tiny(), tmp_path)
    log_file.unlink()
    claim(tiny(), tmp_path)
    (tmp_path / CHECKPOINT_MARK).unlink()
    log_file.touch()
    claim(tiny(), tmp_path)


@pytest.mark.parametrize(("more", "most"), [(["micro_batch=2"], 2), ([], 8), (["batch=300"], 256)])
def test_samples_are_made_with_no_more_rows_at_a_time_than_were_trained(more: list[str], most: int) -> None:
    run, seen = tiny("moons", "train.batch=8", *(f"train.{word}" for word in more)), list[int]()
    net = build(run, torch.device("cpu"))
    net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    made = TrainedRun(run, RunFolder(Path("run")), net).make_samples(torch.zeros(259, dtype=torch.long), nfe=1)
    assert len(made.x) == 259
    assert max(seen) == most


@pytest.mark.slow
def test_a_new_run_begins_from_a_checkpoint_and_is_resumed_when_it_is_typed_again(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    train(tiny(), old)
    words = ["train.batch=3", "train.steps=6"]

    def begin() -> State:
        prepared = prepare(old, words, new, step=2)
        opened = open_trainer(new, prepared.run, changes=prepared.changes, origin=prepared.origin, device="cpu")
        with opened as trainer:
            return trainer.train()

    # It is killed after the origin was recorded, and before the checkpoint is copied.
    with patch.object(shutil, "copytree", side_effect=RuntimeError("killed")), pytest.raises(RuntimeError):
        begin()
    assert not (new / "checkpoints").exists() or not list((new / "checkpoints").glob("step-*"))
    state = begin()
    assert (state.step, state.images) == (6, 2 * 4 + 4 * 3)
    origin = RunFolder(new).origin
    assert origin is not None
    assert (origin.run, origin.step) == (str(old), 2)
    assert load_run(new).spec.train.batch == 3

    # The checkpoint that it began from may be gone by the time it is typed again.
    shutil.rmtree(old / "checkpoints/step-00000002")
    assert begin().step == 6
    with pytest.raises(UserError, match="a different run"):
        train(tiny(), new)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.steps=1"], "train.steps=1, but 2 steps are trained already"),
        (["net.width=9"], "old/checkpoints/step-00000002/net: .* in the file, .* in the run"),
    ],
)
def test_a_new_run_that_is_refused_leaves_nothing(changes: list[str], words: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    train(tiny(), old)
    prepared = prepare(old, changes, new, step=2)
    opened = open_trainer(new, prepared.run, changes=prepared.changes, origin=prepared.origin, device="cpu")
    with pytest.raises(UserError, match=words), opened:
        pass
    assert not new.exists()


def test_a_new_run_does_not_begin_from_weights_that_are_not_finite(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    train(tiny(), old)
    prepared = prepare(old, [], new, step=2)
    opened = open_trainer(new, prepared.run, changes=prepared.changes, origin=prepared.origin, device="cpu")
    with (
        patch("dumo.training.checkpoint.find_nonfinite", return_value="net: a"),
        pytest.raises(UserError, match="step-00000002: net: a is not finite: start from another step"),
        opened,
    ):
        pass
    assert not new.exists()


def test_weights_after_the_step_of_a_resumed_run_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    files = [
        tmp_path / place / f"step-{step:08d}.safetensors" for place in ("milestones", "best") for step in (1, 2, 3)
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert [*folder.begin_at(tiny(), None, 2)] == []
    assert [file.exists() for file in files] == [True, True, False] * 2


@pytest.mark.slow
def test_a_permitted_change_is_listed_and_a_deciding_one_is_refused(tmp_path: Path) -> None:
    train(tiny(), tmp_path)
    told: list[str] = []
    train(tiny("moons", "train.clip=1", "train.steps=6", "train.micro_batch=2"), tmp_path, print_line=told.append)
    changes = [(4, "train.steps", 4, 6), (4, "train.micro_batch", None, 2), (4, "train.clip", None, 1.0)]
    assert noted(tmp_path) == changes
    assert "from step 4 on train.clip is 1.0, and was null" in told
    assert load_run(tmp_path).spec.train.clip == 1
    before = (tmp_path / RUN_FILE).read_bytes()
    words = r"(?s)step-00000006 belongs to a different run:\n  train\.batch: 4 recorded, 5 .*Reset.* --from 6 --out NEW"
    with pytest.raises(UserError, match=words):
        train(tiny("moons", "train.batch=5"), tmp_path)
    assert (tmp_path / RUN_FILE).read_bytes() == before
    assert noted(tmp_path) == changes


def test_a_hash_is_of_all_fields_that_decide_training() -> None:
    free = ("train.clip=1", "train.steps=9", "about=mine", "sample.seed=3", "train.micro_batch=2")
    assert config_hash(tiny("moons", *free)) == config_hash(tiny())
    hashes = {config_hash(tiny("moons", word)) for word in ("train.seed=3", "net.time_scale=3", "train.ref=self")}
    assert len(hashes) == 3
    assert config_hash(run_of(parse_text(dump(tiny()), Path(RUN_FILE)))) == config_hash(tiny())
