"""Work that is killed without a word and started again comes to the end of work that was left alone.

One kill in each of five places, on one process; continuous integration takes the first place. tools/reliability/kill.py
makes as many as one likes, and on two ranks; torchrun's restart after a dead rank is in test_ranks.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from e2e.shell import call, start
from forked import Program
from reliability.kill import kill_repeatedly
from reliability.process import LOG
from reliability.workload import INPUTS, workloads, write_inputs
from tiers import tiered

FLAGS = "os.O_WRONLY | os.O_CREAT | os.O_TRUNC"
TO_LOG = f"import os; log = os.open({LOG!r}, {FLAGS}); os.dup2(log, 1); os.dup2(log, 2); import reliability.command"

FIRST = next(iter(workloads()))


def logged(words: Sequence[str], cwd: Path, ranks: int) -> Program:
    """A process whose two streams go to its `LOG`."""
    assert ranks == 1
    return start(*words, cwd=cwd, first=TO_LOG)


@pytest.mark.parametrize("name", tiered(workloads(), ci=[FIRST]))
def test_a_kill_leaves_the_same_end(
    name: str, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(words: Sequence[str], cwd: Path) -> int:
        monkeypatch.chdir(cwd)
        return call(*words).code

    write_inputs(tmp_path / INPUTS, trained["digits"])
    result = kill_repeatedly(workloads()[name], 1, 1, 0, tmp_path, run=run, start_command=logged)
    assert result.has_passed, result
    assert result.num_hits == 1
