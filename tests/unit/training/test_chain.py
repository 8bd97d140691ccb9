"""Two ranks pass a training on to one, to three and to two: what is restored is what was saved, bit for bit."""

from pathlib import Path

import pytest

from forked import main_of
from meeting import outputs
from tiers import tiered
from unit.training.chain import CASES, CHAIN

PATIENCE = 600  # seconds, on a busy machine


@pytest.mark.parametrize("case", tiered(CASES, ci=["int8-adamw8bit-shards"]))
def test_what_is_restored_is_what_was_saved(case: str, tmp_path: Path) -> None:
    processes = [main_of("unit.training.chain", rank, tmp_path, case, cwd=tmp_path) for rank in range(max(CHAIN))]
    for rank, (out, _) in enumerate(outputs(processes, PATIENCE)):
        assert out.splitlines() == [f"{world} agree" for world in CHAIN if rank < world]
