"""A run by captions, whose encoder learns along."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dumo.data import Data
from dumo.nets.table import Tabled
from dumo.run import encode
from dumo.run.config.load import load
from dumo.run.train import train


def test_stopped_and_resumed_it_hides_the_same_tokens(tmp_path: Path) -> None:
    tiny = ["net.width=8", "net.depth=1", "net.texts.width=8", "net.texts.drop=0.5", f"net.texts.root={tmp_path}/ids"]
    tiny += ["train.batch=4", "train.schedule.kind=constant", "train.save_every=1"]
    runs = {steps: load("digits-words", [*tiny, f"train.steps={steps}"]) for steps in (2, 4)}
    whole = train(runs[4], tmp_path / "whole").net.state_dict()
    train(runs[2], tmp_path / "run")
    assert all(torch.equal(x, whole[name]) for name, x in train(runs[4], tmp_path / "run").net.state_dict().items())


def test_runs_that_start_together_make_their_table_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, make = 0, list[int](), encode.encode_texts

    def slowly(data: Data, spec: Tabled) -> encode.Made:
        nonlocal inside
        inside += 1
        most.append(inside)
        time.sleep(0.1)
        made = make(data, spec)
        inside -= 1
        return made

    monkeypatch.setattr(encode, "encode_texts", slowly)
    run = load("digits-words", [f"net.texts.root={tmp_path}/ids"])
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(encode.make_tokens, [run] * 3))
    assert most == [1, 1, 1]
