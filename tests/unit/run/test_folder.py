"""A folder is one run's: what it holds is compared with what is asked, field by field."""

from pathlib import Path

import pytest
import torch

from dumo.config.load import dump, load
from dumo.config.place import LOG_FILE
from dumo.config.spec import Run
from dumo.run.folder import (
    LOCK_FILE,
    RUN_FILE,
    locked_run_folder,
    mark_checkpoint_written,
    mark_no_checkpoint_yet,
    write_run_file,
)
from dumo.run.sampler import sampler_of
from dumo.run.weights import build
from dumo.types import UserError
from unit.run.known import claim, tiny


def settle(spec: Run, folder: Path) -> None:
    """As training does: claim the folder, then write into it."""
    claim(spec, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_run_file(spec, folder)


def test_a_place_is_settled_once(tmp_path: Path) -> None:
    run = tiny()
    settle(run, tmp_path / "a/b")
    file = tmp_path / "a/b" / RUN_FILE
    assert file.read_text(encoding="utf-8") == dump(run)
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
    with locked_run_folder(folder):
        with pytest.raises(UserError):
            settle_held(tiny(), folder)
        write_run_file(tiny(), folder)
    assert [path.name for path in folder.iterdir()] == [RUN_FILE]
    settle_held(tiny(), folder)
    with pytest.raises(UserError):
        settle_held(tiny("moons", "net.width=17"), folder)


def settle_held(spec: Run, folder: Path) -> None:
    with locked_run_folder(folder):
        claim(spec, folder)
        write_run_file(spec, folder)


def test_a_folder_held_for_nothing_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked_run_folder(tmp_path / "a/b"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_training_leaves_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    settle_held(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


def test_a_run_that_is_cleared_and_killed_before_its_first_checkpoint_may_begin_again(tmp_path: Path) -> None:
    """Its checkpoints and its log were removed, and the mark of a checkpoint was not."""
    write_run_file(tiny(), tmp_path)
    mark_no_checkpoint_yet(tmp_path)
    mark_checkpoint_written(tmp_path)
    log_file = tmp_path / LOG_FILE
    log_file.touch()
    with pytest.raises(UserError):
        claim(tiny(), tmp_path)
    log_file.unlink()
    claim(tiny(), tmp_path)
    mark_no_checkpoint_yet(tmp_path)
    log_file.touch()
    claim(tiny(), tmp_path)


@pytest.mark.parametrize(("more", "most"), [(["micro_batch=2"], 2), ([], 8), (["batch=300"], 256)])
def test_samples_are_made_with_no_more_rows_at_a_time_than_were_trained(more: list[str], most: int) -> None:
    run, seen = tiny("moons", "train.batch=8", *(f"train.{word}" for word in more)), list[int]()
    net = build(run, torch.device("cpu"))
    net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    made = sampler_of(run, net).sample(torch.zeros(259, dtype=torch.long), nfe=1)
    assert len(made.x) == 259
    assert max(seen) == most
