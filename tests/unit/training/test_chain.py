"""Two ranks pass a training on to one, to three and to two: what is restored is what was saved, bit for bit."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from forked import main_of
from meeting import outputs
from unit.training.chain import CASES, CHAIN

PATIENCE = 900  # seconds, on a busy machine; alone all cases take 160


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["int8-adamw8bit-shards"], marks=pytest.mark.slow, id="one"),
        pytest.param(CASES, marks=pytest.mark.nightly, id="all"),
    ],
)
def test_what_is_restored_is_what_was_saved(cases: Sequence[str], tmp_path: Path) -> None:
    processes = [main_of("unit.training.chain", rank, tmp_path, *cases, cwd=tmp_path) for rank in range(max(CHAIN))]
    for rank, (out, _) in enumerate(outputs(processes, PATIENCE)):
        assert out.splitlines() == [f"{world} agree" for world in CHAIN if rank < world]
