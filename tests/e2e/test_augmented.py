"""Augmentation on its way from the data to the net, of a packaged recipe: told in training, absent from samples."""

import json
from pathlib import Path

import pytest

from dumo.flow.generate import labels
from dumo.run.config.load import load
from dumo.run.folder import open_run
from dumo.run.train import train


@pytest.mark.data
def test_the_recipe_trains_on_its_data(tmp_path: Path) -> None:
    """On the test images, which are fewer, with a net of a few layers, and makes images in one pass."""
    small = ["net.width=8", "net.depth=1", "net.multipliers=[1]", "net.attend=[1]", "train.batch=4", "train.steps=2"]
    few = ["data.split=test", "data.memory=0", "train.log_every=1", "train.probe_every=0"]
    train(load("cifar10", [*small, *few]), tmp_path, device="cpu")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["images"] for record in records] == [4, 8]
    assert all(0 < record["loss"] < 10 for record in records)
    (made,) = open_run(str(tmp_path), device="cpu").sampler.batches(labels(3, 0), nfe=1)
    assert made.x.shape == (3, 3, 32, 32)
