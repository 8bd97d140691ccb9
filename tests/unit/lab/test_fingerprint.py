"""Fingerprints differ where objectives do; tables are of the objectives and solvers of today."""

import json
from functools import cache
from typing import Any

import pytest

import measured
from dumo.config.load import load_recipe
from dumo.lab.fingerprint import fingerprint
from dumo.lab.origin import equal_fingerprints
from dumo.lab.plan import Cell, Cost, read_plan
from tiers import tiered


@cache
def first_cells(name: str) -> list[Cell]:
    """The cell of the first seed of each arm of a plan, on a laptop."""
    cells: dict[str, Cell] = {}
    for cell in read_plan(name).cells("laptop"):
        cells.setdefault(cell.arm, cell)
    return list(cells.values())


@pytest.mark.parametrize("name", tiered(measured.names(), ci=["fair", "fig3"]))
def test_tables_are_not_older_than_their_objectives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, `dumo reproduce NAME --scale laptop` measures again."""
    monkeypatch.setattr(Cost, "units", 3.0)  # counting takes long
    monkeypatch.setattr(Cost, "operations", 3.0)
    stored = {cell["cell"]: cell for cell in measured.results(name)["cells"]}
    older = [cell.name for cell in first_cells(name) if is_outdated(stored.get(cell.name), cell)]
    assert not older


def is_outdated(stored: dict[str, Any] | None, cell: Cell) -> bool:
    """Whether a stored cell was trained by another objective than a plan's, or sampled by another solver."""
    if stored is None or "fingerprint" not in stored:
        return True
    solver = json.loads(cell.spec.sample.solver.model_dump_json())
    return stored["solver"] != solver or not equal_fingerprints(stored["fingerprint"], fingerprint(cell.spec))


@pytest.mark.parametrize("name", tiered(measured.names(), ci=["fig3", "fig4c"]))
def test_arms_had_the_steps_that_their_cost_allows(name: str) -> None:
    """Where this fails, passes are counted otherwise today, and arms of equal cost have other steps."""
    stored = {cell["cell"]: cell["step"] for cell in measured.results(name)["cells"]}
    steps = {cell.name: cell.spec.train.steps for cell in read_plan(name).cells("laptop")}
    others = [cell for cell in steps if stored.get(cell) != steps[cell]]
    assert not others


GUIDED = "objective.guide.zeta=0.4"


@pytest.mark.parametrize(
    "setting",
    [
        "objective.beta=0.6",
        "objective.drop=0.2",
        "objective.guide.zeta=0.3",
        "objective.times={kind: logit_normal, mean: 0.5, std: 1.0}",
        "path.sd=0.75",
        "train.ref=0.999",
    ],
)
def test_another_objective_has_another_fingerprint(setting: str) -> None:
    assert fingerprint(load_recipe("digits", [GUIDED, setting])) != fingerprint(load_recipe("digits", [GUIDED]))


def test_other_settings_leave_the_fingerprint() -> None:
    changed = load_recipe("digits", ["net.width=32", "train.steps=7", "train.seed=3", "train.optimizer.lr=1"])
    assert fingerprint(changed) == fingerprint(load_recipe("digits"))
