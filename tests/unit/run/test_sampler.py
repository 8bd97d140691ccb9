"""The samples of several ranks."""

from pathlib import Path

import pytest

from forked import main_of
from meeting import outputs


@pytest.mark.slow
def test_rank_0_alone_has_the_samples_of_all(tmp_path: Path) -> None:
    outputs([main_of("unit.run.gathered", rank, tmp_path / "met", cwd=tmp_path) for rank in range(2)], 240)
