"""What a step sends is what sharding must send: all weights once, not once per pass; however many ranks there are."""

import json
from pathlib import Path

import pytest

from forked import main_of
from meeting import outputs
from tiers import tiered

PATIENCE = 300  # seconds, on a busy machine
PASSES = {"dual": 3, "jvp": 3, "central": 4}  # forward passes of guided DuMo: the heads, V(null), du/dt


@pytest.mark.parametrize("ranks", tiered([1, 2, 8, 64], ci=[1, 2]))
def test_calls_and_bytes_of_a_step(ranks: int, tmp_path: Path) -> None:
    """Copies of all weights: gathered once, or by every pass and the backward one; gradients once; one small table."""
    ((out, _),) = outputs([main_of("theory.collectives", ranks, cwd=tmp_path)], PATIENCE)
    sent = [json.loads(line) for line in out.splitlines()]
    assert {row["share"] for row in sent} == {1, min(2, ranks), ranks}
    assert {row["passes"] for row in sent} == ({1, 4} if ranks in (2, 8) else {1})
    for row in sent:
        share, groups = row["share"], row["groups"]
        gathers = 0 if share == 1 else 1 if not row["reshard"] else PASSES[row["slope"]] + 1
        expected = {"gather": gathers, "scatter": 1 if share > 1 else 0, "reduce": 1 / share if ranks > share else 0}
        calls = {name: groups * (copies > 0) * max(copies, 1) for name, copies in expected.items()}
        calls["reduce"] += ranks > 1  # the log's
        assert row["calls"] == {name: n for name, n in calls.items() if n}, row
        for name, copies in row["copies"].items():
            padding = 0.05 * expected[name] + 0.001  # shards are as large as the largest; the log's table
            assert expected[name] <= copies <= expected[name] + padding, (name, row)
