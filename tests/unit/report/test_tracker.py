"""A tracker gets each row of the log as it is written, and a resumed training resumes the tracker's run."""

import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dumo import runtime
from dumo.report import tracker
from dumo.report.tracker import open_tracker
from dumo.types import UserError
from unit.run import known


def test_numbers_are_named_by_path() -> None:
    row: dict[str, Any] = {"step": 3, "loss": None, "skipped": {"what": "loss", "count": 2, "rows": [{"t": 0.5}]}}
    assert tracker.numbers_by_name(row) == {"train/skipped/count": 2.0, "train/skipped/rows/0/t": 0.5}
    row = {"lr": 1, "ok": True, "bins": {"v": [0.5, math.nan]}, "val": {"mmd": 0.25}, "speed": {"bytes": 3}}
    assert tracker.numbers_by_name(row) == {
        "train/lr": 1.0,
        "train/bins/v/0": 0.5,
        "val/mmd": 0.25,
        "speed/bytes": 3.0,
    }


def test_an_unknown_or_missing_tracker_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="wanddb"):
        tracker.require_tracker("wanddb")
    monkeypatch.setattr(runtime, "installed_version", lambda name: None)
    with pytest.raises(UserError, match="wandb"):
        tracker.require_tracker("wandb")
    assert not [*tmp_path.iterdir()]


def test_tensorboard_shows_no_step_twice(tmp_path: Path) -> None:
    """Steps after the checkpoint are repeated by a resumed training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, losses in ((0, [1.0, 2.0, 3.0]), (1, [5.0, 6.0])):
        opened = open_tracker("tensorboard", tmp_path, known.tiny(), first)
        for step, loss in enumerate(losses, first + 1):
            opened.log({"train/loss": loss}, step=step)
        opened.finish()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 1.0), (2, 5.0), (3, 6.0)]


PROGRAM = """
import sys
from pathlib import Path
from dumo.report.tracker import open_tracker
from unit.run import known
name, folder = sys.argv[1:]
for first in (0, 1):
    tracker = open_tracker(name, Path(folder), known.tiny(), first)
    for step in (first + 1, first + 2):
        tracker.log({"train/loss": 1.0 + first}, step=step)
    tracker.finish()
"""


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_resume_their_run(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    env = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(folder)], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done
    run_id = (folder / "tracker-id").read_text()
    if name == "wandb":
        assert len([*(folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")]) == 2
    else:
        with sqlite3.connect(tmp_path / "trackio/dumo.db") as base:
            rows = base.execute("select distinct run_name, step from metrics order by step").fetchall()
        assert rows == [(f"run-{run_id}", step) for step in (1, 2, 3)]
