"""What a training says before its first step."""

import pytest
import torch

from dumo.config.load import load
from dumo.run import summary
from dumo.run.summary import misfits

CPU = torch.device("cpu")


def test_what_does_not_fit_says_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    train = load("my-images").train
    monkeypatch.setattr(summary, "operations_per_second", lambda here: 1e9)
    modes, hours = misfits(train, 1e9 * 3600 * 48, CPU)
    assert modes.endswith('changes={"train.precision": "fp32", "train.compile": "none"}')
    assert "20,000 steps take 48 hours" in hours
    assert hours.endswith('changes={"train.steps": 10000}')
    (_, hours) = misfits(train, 1e9 * 3600 * 48, CPU, step=15_000)  # what is left takes two days
    assert "5,000 steps take 48 hours" in hours
    assert hours.endswith('changes={"train.steps": 17500}')
    assert not [*misfits(load("digits").train, 1e9, CPU)]
