"""What a training says before its first step."""

import json
from math import prod

import pytest
import torch

from dumo.config import recipes
from dumo.config.load import load
from dumo.run import cost, summary
from dumo.run.net import outline
from dumo.run.summary import MAX_UNITS, may_take_a_day, misfits

CPU = torch.device("cpu")


def test_what_does_not_fit_says_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("my-images")
    monkeypatch.setattr(summary, "operations_per_second", lambda here: 1e9)
    modes, hours = misfits(run, 1e9 * 3600 * 48, CPU)
    assert modes.endswith('changes={"train.precision": "fp32", "train.compile": "none"}')
    assert "20,000 steps take 48 hours" in hours
    assert hours.endswith('changes={"train.steps": 10000}')
    (_, hours) = misfits(run, 1e9 * 3600 * 48, CPU, step=15_000)  # what is left takes two days
    assert "5,000 steps take 48 hours" in hours
    assert hours.endswith('changes={"train.steps": 17500}')
    assert not [*misfits(load("digits"), 1e9, CPU)]
    assert len([*misfits(run, None, CPU)]) == 1  # few operations


@pytest.mark.parametrize("name", recipes.names())
def test_what_a_cpu_is_told_to_set_can_be_set(name: str) -> None:
    for line in misfits(load(name), None, CPU):
        changes = json.loads(line.partition("changes=")[2])
        load(name, [f"{field}={value}" for field, value in changes.items()])


def test_operations_are_counted_of_a_run_that_may_take_a_day() -> None:
    for recipe, is_long in (("moons", False), ("digits", False), ("my-images", True), ("imagenet256-xl2", True)):
        run = load(recipe)
        net = outline(run)
        bound = MAX_UNITS * 2 * sum(p.numel() for p in net.parameters()) * prod(run.data.shape)
        if not is_long:  # the bound holds
            assert cost.step_cost(net, run.objective, run.path, run.data.shape).flops < bound, recipe
        assert may_take_a_day(run.train, net, run.data.shape) == is_long, recipe
        assert not may_take_a_day(run.train.model_copy(update={"minutes": 5.0}), net, run.data.shape), recipe
