"""Stored results are those of the plans of today: the same steps, and the same solvers."""

import json

import pytest

import measured
from dumo.lab.experiment import read_plan
from tiers import tiered


@pytest.mark.parametrize("name", tiered(measured.names(), ci=["fig3", "fig4c"]))
def test_arms_had_the_steps_that_their_cost_allows(name: str) -> None:
    """If this fails, passes are counted differently today, and arms of equal cost have other steps."""
    stored = {cell["cell"]: (cell["step"], cell["solver"]) for cell in measured.results(name)["cells"]}
    others: list[str] = []
    for cell in read_plan(name).cells("laptop"):
        planned = (cell.spec.train.steps, json.loads(cell.spec.sample.solver.model_dump_json()))
        if stored.get(cell.name) != planned:
            others.append(cell.name)
    assert not others
