"""Numbers that pages say are those that are counted, or stored."""

import re
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch

from contract.case import kind, members
from dumo.flow.guide import Guide
from dumo.flow.path import Linear, Trig
from dumo.flow.slope import DualSlope
from dumo.nets import DiT
from dumo.objectives import Objective
from dumo.run.config.load import load
from dumo.run.plan.cost import forward_units
from dumo.types import Spec

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/objectives"
SHAPE = (4, 4, 4)
DEPTH = 500  # blocks, so that what is not a block hardly counts
OBJECTIVES = members(Objective)


@cache
def table() -> dict[str, tuple[str, ...]]:
    """The table of docs/objectives/index.md: the cells that follow the kind, by kind."""
    lines = (PAGES / "index.md").read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.split(" | ")] for line in lines if re.match(r"\| \[.*details.md#\w+\) \|", line)
    ]
    return {row[1].strip("`"): tuple(row[2:]) for row in rows}


@cache
def sections() -> dict[str, str]:
    """The sections of docs/objectives/details.md, by kind."""
    _, *found = re.split(r"^## (\w+)$", (PAGES / "details.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def told(name: str) -> tuple[float, float | None]:
    """What a step costs by the table, unguided and guided; None where it says no number."""
    plain, guided = table()[name][:2]
    return float(plain), float(guided) if guided[0].isdigit() else None


def counted(cls: type[Spec], *, guided: bool) -> float | None:
    """What a step costs with all labels kept and the slope that rides; None where guidance is not the objective's."""
    name, fields = kind(cls), cls.model_fields
    if "guide" in fields:
        guidance: dict[str, object] = {"guide": Guide(zeta=0.5 if guided else 0)}
    elif "scale" in fields:
        guidance = {"scale": 1.5 if guided else 1}
    elif name == "imf":
        guidance = {} if guided else {"w": None}
    elif guided:
        return None
    else:
        guidance = {}
    objective = cls(**guidance, drop=0, **({"slope": DualSlope()} if "slope" in fields else {}))
    with torch.device("meta"):
        net = DiT(width=256, depth=1, attention=1).build(objective.needs, SHAPE, 10)
    net.blocks.extend([net.blocks[0]] * (DEPTH - 1))
    return forward_units(net, objective, Trig() if objective.needs.formulas.paths == ("trig",) else Linear(), SHAPE)


def test_every_objective_has_a_row_and_a_section() -> None:
    assert table().keys() == sections().keys() == {kind(cls) for cls in OBJECTIVES}


@pytest.mark.slow
@pytest.mark.parametrize("cls", OBJECTIVES, ids=kind)
def test_a_step_costs_what_the_table_says(cls: type[Spec]) -> None:
    for number, guided in zip(told(kind(cls)), (False, True), strict=True):
        assert counted(cls, guided=guided) == (number and pytest.approx(number, abs=0.015))


def test_two_steps_cost_what_the_table_says() -> None:
    """The slow group counts all; here one without a slope, and one with."""
    for cls in OBJECTIVES:
        if kind(cls) in ("imm", "dumo"):
            assert counted(cls, guided=False) == pytest.approx(told(kind(cls))[0], abs=0.015)


@pytest.mark.parametrize("name", sorted(kind(cls) for cls in OBJECTIVES))
def test_a_section_says_what_the_table_says(name: str) -> None:
    plain, guided = told(name)
    said = re.search(r"A step costs \*\*([\d.]+) F\*\*(?:, guided \*\*([\d.]+) F\*\*)?", sections()[name])
    assert said
    assert (float(said[1]), said[2] and float(said[2])) == (plain, guided)


@pytest.mark.parametrize("name", sorted(kind(cls) for cls in OBJECTIVES))
def test_a_section_trains_its_objective(name: str) -> None:
    lines = sections()[name].replace("\\\n", "")
    recipes = re.findall(r"^dumo train ([\w-]+)(?!.*objective=)", lines, re.MULTILINE)
    assert recipes
    assert {load(recipe).objective.kind for recipe in recipes} == {name}


def test_tables_are_those_of_the_results() -> None:
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    pages = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    assert {place["name"] for text in pages for place in tables["PLACE"].finditer(text)} == {*tables["TABLES"]}
    for text in pages:
        assert tables["written"](text) == text, "python docs/tables.py writes it again"
    results = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    assert tables["written"](results.replace("| 4.52 |", "| 4.53 |")) == results
