"""What differs from the source is said where a run is looked at and where it begins, on stderr, and nothing stops."""

from pathlib import Path

import pytest

from e2e.shell import TINY, call, sets

SHORTCUT = sets("objective.kind=shortcut", "sample.solver.kind=hop")


@pytest.mark.usefixtures("uncompiled")
def test_it_is_said_by_what_looks_at_a_run(tmp_path: Path) -> None:
    for words in (("show",), ("dry", "--json"), ("doctor", "--json")):
        done = call(words[0], "digits", *words[1:], *TINY, *SHORTCUT)
        assert done.code == 0
        assert "--set train.ref=0.999" in done.err
        assert "train.ref=0.999" not in done.out
    followed = call("show", "digits", *TINY, *SHORTCUT, "--set", "train.ref=0.999")
    assert (followed.code, followed.err) == (0, "")
