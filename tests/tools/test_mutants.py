"""Every planted error has its place and its test, so `make mutants` has no stale row."""

from pathlib import Path

import pytest

import mutants
from mutants import Mutant, PytestResult


def fault(row: Mutant) -> str | None:
    """What is wrong about a row, if anything is."""
    try:
        row.mutated_text()
        path, *node = row.test_id().split("::")
    except ValueError as error:
        return str(error)
    text = (mutants.ROOT / path).read_text(encoding="utf-8")
    gone = [name for name in node if f"def {name.partition('[')[0]}(" not in text]
    return f"{row.test!r} is gone: mend tools/mutants.toml" if gone else None


def test_no_row_is_stale() -> None:
    assert [found for row in mutants.read_mutants() if (found := fault(row))] == []


def test_a_stale_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mutants.toml"
    table.write_text(
        '["runtime/random.py"]\n"a" = ["x y z", "", "random::test_x"]\n"b" = ["", "", "nothing::test_x"]\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(mutants, "TABLE", table)
    lost, wild = mutants.read_mutants()
    assert fault(lost) == "runtime/random.py has 'x y z' 0 times: mend tools/mutants.toml"
    with pytest.raises(ValueError, match="'nothing::test_x' is a test of no file"):
        wild.test_id()
    assert mutants.read_mutants("runtime/random.py b") == [wild]
    assert mutants.read_mutants("neither") == []


def test_a_row_that_names_a_whole_file_is_refused() -> None:
    row = Mutant("runtime/random.py", "a", "def keyed_normal(", "def no(", "random")
    assert fault(row) == "'random' names no single test: mend tools/mutants.toml"


@pytest.mark.slow
def test_a_row_has_the_seconds_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_busy.py").write_text(
        "import time\n\ndef test_busy():\n    while time.process_time() < 0.5:\n        pass\n", encoding="utf-8"
    )
    result = mutants.run_pytest([str(tmp_path / "test_busy.py")])
    assert result.exit_code == 0
    assert 0.5 <= result.cpu_seconds <= 10


def test_an_error_is_left_to_the_night_where_its_test_was_not_chosen_and_only_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A test that is not found at all is no reason to leave one."""
    no_test = PytestResult(pytest.ExitCode.NO_TESTS_COLLECTED, "", 0.1)
    monkeypatch.setattr(mutants, "run_pytest", lambda arguments, module: no_test)
    row = mutants.read_mutants()[0]
    assert mutants.try_mutant(row, ["-m", "not nightly"]).is_left_to_night
    survivor = mutants.try_mutant(row, [])
    assert (survivor.is_left_to_night, survivor.failed_test) == (False, None)
