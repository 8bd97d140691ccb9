"""A pretrained net's blocks are compiled each whole, the derivative that rides along too, and teach the same."""

import json
from pathlib import Path

import pytest

from forked import python


@pytest.mark.slow
def test_compiled_blocks_teach_the_same(tmp_path: Path) -> None:
    """Of two kinds, Flux's; in a process of its own, for what checks shapes in tests cannot be compiled."""
    told, _ = python("from unit.nets.compiled import main; main('flux')", cwd=tmp_path).communicate()
    compiled, kinds, off = json.loads(told.splitlines()[-1])
    assert (compiled, kinds) == (2, 2)
    assert off < 1e-5
