"""Two ranks of `dumo.Flow` are one process that has the whole batch, whatever wraps the network: gradients to 1e-6."""

import json
from pathlib import Path
from typing import Any

import pytest

from forked import main_of
from meeting import outputs
from theory.flows import CASES
from tiers import tiered

LIMIT = 1e-6
PATIENCE = 400  # seconds, on a busy machine; alone they take 40


def of_two_ranks(what: str, folder: Path) -> list[list[dict[str, Any]]]:
    """What each of two ranks prints."""
    file = str(folder / "meeting")
    said = outputs([main_of("theory.flows", rank, file, what, cwd=Path.cwd()) for rank in "01"], PATIENCE)
    return [[json.loads(line) for line in out.splitlines()] for out, _ in said]


@pytest.mark.parametrize("what", tiered(["few", "all"], ci=["few"]))
def test_two_ranks_are_one(what: str, tmp_path: Path) -> None:
    first, second = of_two_ranks(what, tmp_path)
    assert len(first) == len(second) == len(CASES[what])
    for row, other in zip(first, second, strict=True):
        assert row["error"] < LIMIT, row
        assert other["error"] < LIMIT, other
        assert row["loss"] != other["loss"]
        assert row["why"].startswith("dual: ")


@pytest.mark.slow
def test_two_ranks_choose_the_same_slope_and_are_refused_alike(tmp_path: Path) -> None:
    for (said,) in of_two_ranks("refusals", tmp_path):
        assert said["slope"].startswith("none: jvp")
        assert "not dual" in said["slope"]
        assert "not dual" in said["given slope"]
        assert "weights in bfloat16" in said["in half"]
