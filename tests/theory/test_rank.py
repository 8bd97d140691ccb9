"""A tangent that rides on a compiled, replicated or sharded net is that of one eager process: gradients to 1e-6."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dumo
from contract.case import randomise
from dumo.flow.slope import Dual
from dumo.nets import DiT
from theory.ranks import CLASSES, OBJECTIVES, SHAPE, compiled, gradient, record

LIMIT = 1e-6
SCRIPT = Path(__file__).parent / "ranks.py"
PATIENCE = 300  # seconds, on a busy machine; alone they take 60


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What rank 0 of two processes found, a row per objective and wrapper."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dumo.__file__).parents[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(meeting)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], answers[0][1][-3000:] + answers[1][1][-3000:]
    yield [json.loads(line) for line in answers[0][0].splitlines()]


def test_every_objective_met_every_wrapper(rows: list[dict[str, Any]]) -> None:
    wrappers = {"ddp", "fsdp", "resharded", "both"}
    assert {(row["case"], row["net"]) for row in rows} == {(case, net) for case in OBJECTIVES for net in wrappers}


def test_two_ranks_are_one(rows: list[dict[str, Any]]) -> None:
    assert all(0 < row["error"] < LIMIT for row in rows), rows


def test_a_tape_whose_weights_are_given_back_becomes_a_pass_and_says_so(rows: list[dict[str, Any]]) -> None:
    """A ride is over before the weights go, and so is nothing to speak of."""
    for row in rows:
        fell = row["way"] == "tape" and row["net"] == "resharded"
        assert bool(row["said"]) == fell, row
        assert all("reshard_after_forward=False" in said for said in row["said"])


@pytest.mark.parametrize("case", OBJECTIVES)
def test_regional_compilation_keeps_the_gradient(case: str) -> None:
    """Each block one graph, without a break, and all blocks the same two graphs: with a tangent and without."""
    objective = OBJECTIVES[case]
    assert objective.slope == Dual()
    net = randomise(DiT(patch=2, width=32, depth=3, attention=2).build(objective.needs, SHAPE, CLASSES))
    b = record(objective, 0, 1)
    torch._dynamo.reset()
    wanted = gradient(net, net, objective, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        found = gradient(compiled(net), net, objective, b)
    assert 0 < (found - wanted).norm() / wanted.norm() < LIMIT
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 3, "blocks of the same shape share their graphs"
    torch._dynamo.reset()
