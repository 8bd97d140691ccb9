"""Work that is killed without a word and started again comes to the end of work that was left alone.

One kill in each of five places, on one process. tests/reliability/kill.py makes as many as one likes, and on two ranks;
torchrun's restart after a dead rank is in test_ranks.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from e2e.shell import call
from reliability.kill import trial
from reliability.place import given, places


@pytest.mark.slow
@pytest.mark.parametrize("name", places())
def test_a_kill_leaves_the_same_end(
    name: str, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(words: Sequence[str], cwd: Path) -> int:
        monkeypatch.chdir(cwd)
        return call(*words).code

    given(tmp_path / "given", trained["digits"])
    row = trial(places()[name], 1, 1, 0, tmp_path, finish=finish)
    assert row.good, row
    assert row.hits == 1
