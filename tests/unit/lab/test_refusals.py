"""Plans that would compare wrongly without a word are refused, by the name of what is wrong."""

from pathlib import Path

import pytest

from dumo.lab.experiment import read_plan, require_fair, require_runnable

PLAN = """
scales: {laptop: {cost: passes, steps: 200, seeds: [0]}}
title: Mine
arms:
  - {objective: DuMo, recipe: moons}
  - {objective: Flow, recipe: moons-flow-matching}
"""
WIDER = ("recipe: moons-flow-matching", "recipe: moons-flow-matching, set: [net.width=512]")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("recipe: moons-flow-matching", "recipe: moons, set: [train.steps=9]", "train.steps"),
        ("recipe: moons-flow-matching", "recipe: moons, set: [train.seed=9]", "train.seed"),
        ("recipe: moons-flow-matching", "recipe: moons, set: [train.minutes=9]", "train.minutes"),
        ("recipe: moons-flow-matching", "recipe: moons, set: ['train={steps: 9}']", "train="),
        ("Flow", "dumo", "dumo-0"),
        ("seeds: [0]", "seeds: [0, 0]", "dumo-0"),
        ("recipe: moons-flow-matching", "recipe: moons-flow-matching, share: 0.0001", "flow-0"),
        (*WIDER, "cost: operations"),
        ("cost: passes", "cost: steps", "cost: operations"),
        ("cost: passes, ", "", "cost"),
        ("recipe: moons-flow-matching", "recipe: moons, set: [objective.kind=not_mine:Robust]", "not_mine:Robust"),
    ],
)
def test_a_plan_that_would_compare_wrongly(old: str, new: str, named: str, tmp_path: Path) -> None:
    assert old in PLAN
    file = tmp_path / "mine.yaml"
    file.write_text(PLAN.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=named):  # UserError, and what pydantic raises
        check(file)


def check(file: Path) -> None:
    """Read a plan, and check it as `dumo reproduce` does."""
    plan = read_plan(str(file))
    cells = list(plan.cells("laptop"))
    require_runnable(cells)
    require_fair(cells, plan.get_scale("laptop").cost)
