"""A run that is killed while a tracker follows it and started again: the tracker has its rows, in one run."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from e2e.shell import TINY, call, finish, refused, sets, start, wait

LOGGED = sets("train.log_every=5", "train.save_every=100", "evaluate.every=50", "train.schedule.kind=constant")


def rows(run: Path) -> list[dict[str, Any]]:
    """Its log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_tensorboard_follows_a_run_over_a_kill(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("train", "digits", "--out", "run", "--track", "tensorboard", *TINY, *LOGGED)
    killed, tracked = start(*words, *sets("train.steps=100000"), cwd=here), here / "run/tracked.json"

    def ahead() -> bool:
        """Whether it has rows that no checkpoint has, and stands still."""
        os.kill(killed.pid, signal.SIGSTOP)
        if tracked.exists() and rows(here / "run")[-1]["step"] % 100 > 5:
            return True
        os.kill(killed.pid, signal.SIGCONT)
        return False

    wait(killed, ahead)
    os.kill(killed.pid, signal.SIGKILL)
    finish(killed)
    far = rows(here / "run")[-1]["step"]
    done = call(*words, *sets(f"train.steps={far + 20}"))
    assert done.code == 0, done
    assert "warning" not in done.err
    assert done.out == ""
    assert len((here / "run/metrics.cut.jsonl").read_text().splitlines()) > 1, "nothing was undone"
    (folder,) = (here / "run/tensorboard").iterdir()  # one run of the tracker
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = read.Tags()["scalars"]
    assert {"train/loss", "train/grad_norm", "train/lr", "speed/images_per_second"} <= {*tags}
    lead = next(tag for tag in tags if tag.startswith("val/") and not tag.endswith("_sd"))
    steps = [row["step"] for row in rows(here / "run")]
    assert sorted({event.step for event in read.Scalars("train/loss")}) == steps
    assert sorted({event.step for event in read.Scalars(lead)}) == [n for n in steps if n % 50 == 0]
    done = call("log", "run", "--to", "tensorboard")
    assert "run: 0 rows sent to tensorboard" in done.err


def test_an_unknown_tracker_is_refused(here: Path) -> None:
    refused("train", "digits", *TINY, "--track", "wanddb", named=("tracker", "wanddb", "wandb"))
    assert not (here / "runs").exists()
