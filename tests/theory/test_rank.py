"""A tangent fused with a compiled, replicated or sharded pass is that of one eager process: gradients to 1e-6."""

import json
from pathlib import Path
from typing import Any

import pytest

from contract.case import members
from dumo.objectives import Objective
from forked import main_of
from meeting import outputs
from theory.ranks import CASES, EVERY, OBJECTIVES, WRAPPERS
from tiers import tiered

LIMIT = 1e-6
ROUGH = 1e-5  # of objectives that subtract what is nearly equal, and so multiply rounding: secants, IMM's kernels
PATIENCE = 400  # seconds, on a busy machine; alone they take 60
Rows = list[dict[str, Any]]


def rows_of(*commands: tuple[str, ...]) -> Rows:
    """What the first of these processes, run together, printed."""
    (out, _), *_ = outputs([main_of("theory.ranks", *words, cwd=Path.cwd()) for words in commands], PATIENCE)
    return [json.loads(line) for line in out.splitlines()]


def of_two_ranks(what: str, folder: Path) -> Rows:
    """What two ranks print of these cases."""
    return rows_of(*((rank, str(folder / "meeting"), what) for rank in "01"))


@pytest.fixture(scope="module", params=tiered(["few", "wrappers"]))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Every wrapper, with a case of each way of the slope or with all."""
    rows = of_two_ranks(request.param, tmp_path_factory.mktemp("ranks"))
    assert {(row["case"], row["net"]) for row in rows} == {(case, wrap.__name__) for wrap, case in CASES[request.param]}
    return rows


def test_every_wrapper_is_met(pair: Rows) -> None:
    for wrap in WRAPPERS:
        assert {row["way"] for row in pair if row["net"] == wrap.__name__} == {"deferred", "fused"}


def test_two_ranks_are_one(pair: Rows) -> None:
    for row in pair:
        assert 0 < row["error"] < LIMIT, row


@pytest.mark.nightly
def test_two_ranks_are_one_for_every_objective(tmp_path: Path) -> None:
    rows = of_two_ranks("objectives", tmp_path)
    assert {row["case"] for row in rows} == {*EVERY}
    assert len(EVERY) >= len(members(Objective)) - 1  # without DMD2
    for row in rows:
        assert 0 < row["error"] < ROUGH, row


def test_a_tape_whose_weights_are_given_back_becomes_a_pass_and_says_so(pair: Rows) -> None:
    """A fused pass is over before the weights go, and there is nothing to say."""
    for row in pair:
        fell = row["way"] == "deferred" and row["net"] == "resharded"
        assert bool(row["said"]) == fell, row
        assert all("reshard_after_forward=False" in said for said in row["said"])


@pytest.mark.nightly
def test_regional_compilation_keeps_the_gradient() -> None:
    """Each block one graph, without a break; all blocks share one with tangents and one without, of each shape."""
    alone = rows_of(("alone",))
    met = {(case, "compiled") for case in OBJECTIVES} | {("deferred", "inductor")}
    assert {(row["case"], row["net"]) for row in alone} == met
    for row in alone:
        assert row["error"] < LIMIT, row
        assert 0 < row["graphs"] <= 3, row
