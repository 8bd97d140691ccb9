"""A training that is killed at the entry of a function ends with the files of an undisturbed one."""

from pathlib import Path

import pytest

from e2e.shell import TINY, call, files, finish, start
from tiers import tiered

WORDS = (
    *("train", "digits", "--out", "run", *TINY),
    "train.steps=6",
    "train.save_every=2",
    "train.keep=2",
    "train.log_every=1",
    "train.milestones=[0, 2, 4]",
    "evaluate.every=2",
    "evaluate.best=true",
    "train.sheets=2",
    "sample.nfe=[1, 2]",
)
# A function by its module and name, and which call of it: the process is killed where that begins.
POINTS = [
    ("dumo.run.folder:RunFolder.begin_at", 1),
    ("dumo.run.folder:RunFolder.write_run", 1),
    ("dumo.training.milestone:save_milestone", 1),
    ("dumo.run.trainer:Trainer.train_step", 1),
    ("dumo.training.log:append", 3),
    ("dumo.run.folder:RunFolder.save_if_best", 1),
    ("dumo.run.hooks:SaveCheckpoints.after_step", 2),
    ("dumo.run.folder:RunFolder.mark_checkpoint_written", 1),
    ("dumo.run.folder:RunFolder.save_if_best", 2),
    ("dumo.run.hooks:SaveCheckpoints.after_step", 4),
    ("dumo.training.checkpoint:write_state_file", 2),
    ("dumo.run.folder:RunFolder.mark_checkpoint_written", 2),
    ("dumo.run.sheet:RenderSheets._render_sheet", 4),
    ("dumo.training.checkpoint:Checkpoints.prune", 3),
    ("dumo.run.hooks:Hook.after_training", 1),
]
KILL = """
import importlib, os, signal
module, _, path = {point!r}.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
function, calls = getattr(owner, name), 0
def killed(*arguments, **options):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)
setattr(owner, name, killed)
"""
# Speeds differ from run to run.
TIMED = "speed.jsonl"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that was left alone."""
    here = tmp_path_factory.mktemp("undisturbed")
    done = finish(start(*WORDS, cwd=here))
    assert done.code == 0, done
    return files_of(here)


def files_of(here: Path) -> dict[str, bytes]:
    """The files of the run in a folder, without its speeds."""
    return {name: content for name, content in files(here / "run").items() if name != TIMED}


@pytest.mark.parametrize(("point", "number"), tiered(POINTS, ci=[POINTS[8]], id=lambda point: f"{point[0]}-{point[1]}"))
def test_a_killed_training_ends_as_an_undisturbed_one(
    point: str, number: int, undisturbed: dict[str, bytes], here: Path
) -> None:
    done = finish(start(*WORDS, cwd=here, first=KILL.format(point=point, call=number)))
    assert done.code == -9, done
    again = call(*WORDS)
    assert again.code == 0, again
    assert files_of(here).keys() == undisturbed.keys()
    assert [name for name, content in files_of(here).items() if undisturbed[name] != content] == []
