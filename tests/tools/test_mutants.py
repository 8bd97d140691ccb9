"""Every planted error has its place and its tests, so `make mutants` has no stale row."""

from pathlib import Path

import pytest

import mutants
from mutants import Mutant


def fault(row: Mutant) -> str | None:
    """What is stale about a row."""
    try:
        row.text()
        path, *node = row.path().split("::")
    except ValueError as error:
        return str(error)
    text = (mutants.ROOT / path).read_text(encoding="utf-8")
    gone = [name for name in node if f"def {name.partition('[')[0]}(" not in text]
    return f"{row.tests!r} is gone: mend tools/mutants.toml" if gone else None


def test_no_row_is_stale() -> None:
    assert [found for row in mutants.mutants() if (found := fault(row))] == []


def test_a_stale_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mutants.toml"
    table.write_text(
        '["runtime/random.py"]\n"a" = ["x y z", "", "random"]\n"b" = ["", "", "nothing"]\n', encoding="utf-8"
    )
    monkeypatch.setattr(mutants, "TABLE", table)
    lost, wild = mutants.mutants()
    assert fault(lost) == "runtime/random.py has 'x y z' 0 times: mend tools/mutants.toml"
    with pytest.raises(ValueError, match="'nothing' are the tests of no file"):
        wild.path()
    assert mutants.mutants("runtime/random.py b") == [wild]
    assert mutants.mutants("neither") == []
