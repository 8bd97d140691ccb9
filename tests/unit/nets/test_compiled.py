"""A pretrained net's blocks are compiled each whole, the derivative that rides along too, and teach the same."""

import json
from pathlib import Path

import pytest

from forked import python


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])  # blocks of one kind, and of two
def test_compiled_blocks_teach_the_same(tmp_path: Path, name: str) -> None:
    """Of adapters, heads and embedder; in a process of its own, for what checks shapes in tests cannot be compiled."""
    told, _ = python(f"from unit.nets.compiled import main; main({name!r})", cwd=tmp_path).communicate()
    compiled, kinds, off = json.loads(told.splitlines()[-1])
    assert compiled == 2
    assert kinds == {"sd3": 1, "flux": 2}[name]
    assert off < 1e-5
