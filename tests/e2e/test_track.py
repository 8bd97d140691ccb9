"""A run that is killed and started again with a tracker: the tracker has its rows, each step once."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from e2e.shell import TINY, call, finish, refused, start, wait

LOGGED = ["train.log_every=5", "train.save_every=100", "evaluate.every=50", "train.schedule.kind=constant"]


def rows(run: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.nightly
def test_tensorboard_follows_a_run_over_a_kill(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("train", "digits", "--out", "run", "--track", "tensorboard", *TINY, *LOGGED)
    killed = start(*words, "train.steps=100000", cwd=here)

    def ahead() -> bool:
        """Whether it has rows that no checkpoint has, and stands still."""
        os.kill(killed.pid, signal.SIGSTOP)
        logged = rows(here / "run")
        if logged and logged[-1]["step"] > 100 and logged[-1]["step"] % 100 > 5:
            return True
        os.kill(killed.pid, signal.SIGCONT)
        return False

    wait(killed, ahead)
    os.kill(killed.pid, signal.SIGKILL)
    finish(killed)
    far = rows(here / "run")[-1]["step"]
    done = call(*words, f"train.steps={far + 20}")
    assert done.code == 0, done
    read = EventAccumulator(str(here / "run/tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = read.Tags()["scalars"]
    assert {"train/loss", "train/grad_norm", "train/lr", "speed/images_per_second"} <= {*tags}
    lead = next(tag for tag in tags if tag.startswith("val/") and not tag.endswith("_sd"))
    logged = {row["step"] for row in rows(here / "run")}
    steps = [event.step for event in read.Scalars("train/loss")]
    assert steps == sorted({*steps}), "a step is there twice"
    assert {step for step in logged if step > far} <= {*steps} <= logged
    assert {event.step for event in read.Scalars(lead)} <= {step for step in logged if step % 50 == 0}


def test_an_unknown_tracker_is_refused(here: Path) -> None:
    refused("train", "digits", *TINY, "--track", "wanddb", named=("wanddb", "wandb"))
    assert not (here / "runs").exists()
