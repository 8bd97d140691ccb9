"""A run by captions, whose encoder learns along."""

from pathlib import Path

import torch

from dumo.config.load import load
from dumo.run.train import train


def test_stopped_and_resumed_it_hides_the_same_tokens(tmp_path: Path) -> None:
    tiny = ["net.width=8", "net.depth=1", "net.texts.width=8", "net.texts.drop=0.5", f"net.texts.root={tmp_path}/ids"]
    tiny += ["train.batch=4", "train.schedule.kind=constant", "train.save_every=1"]
    runs = {steps: load("digits-words", [*tiny, f"train.steps={steps}"]) for steps in (2, 4)}
    whole = train(runs[4], tmp_path / "whole").net.state_dict()
    train(runs[2], tmp_path / "run")
    assert all(torch.equal(x, whole[name]) for name, x in train(runs[4], tmp_path / "run").net.state_dict().items())
