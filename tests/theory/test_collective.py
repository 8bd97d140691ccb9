"""What a step sends is what sharding must send: all weights once, not once per pass; however many ranks there are."""

import json
from typing import Any

import pytest

from forked import main_of
from meeting import outputs

PATIENCE = 300  # seconds, on a busy machine
PASSES = {"dual": 3, "jvp": 3, "central": 4}  # forward passes of guided DuMo: the heads, V(null), du/dt


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A row per case of `collectives.py`."""
    ((out, _),) = outputs([main_of("theory.collectives", cwd=tmp_path_factory.mktemp("collectives"))], PATIENCE)
    return [json.loads(line) for line in out.splitlines()]


def test_calls_and_bytes_of_a_step(sent: list[dict[str, Any]]) -> None:
    """Copies of all weights: gathered once, or by every pass and the backward one; gradients once; one small table."""
    for row in sent:
        world, share, groups = row["world"], row["share"], row["groups"]
        gathers = 0 if share == 1 else 1 if not row["reshard"] else PASSES[row["slope"]] + 1
        expected = {"gather": gathers, "scatter": 1 if share > 1 else 0, "reduce": 1 / share if world > share else 0}
        calls = {name: groups * (copies > 0) * max(copies, 1) for name, copies in expected.items()}
        calls["reduce"] += world > 1  # the log's
        assert row["calls"] == {name: n for name, n in calls.items() if n}, row
        for name, copies in row["copies"].items():
            padding = 0.05 * expected[name] + 0.001  # shards are as large as the largest; the log's table
            assert expected[name] <= copies <= expected[name] + padding, (name, row)


def test_the_cases(sent: list[dict[str, Any]]) -> None:
    shares = {1: {1}, 2: {1, 2}, 8: {1, 2, 8}, 64: {1, 2, 64}}
    assert {(row["world"], row["share"]) for row in sent} == {(n, share) for n, of in shares.items() for share in of}
    assert {row["passes"] for row in sent} == {1, 4}
