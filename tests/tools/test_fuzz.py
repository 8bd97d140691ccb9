"""Files that are changed are taken, or refused in plain words: a few of each kind; the tool tries thousands."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dumo.types import UserError
from fuzz.command import OPTIONS, outcome_of_command
from fuzz.file import Target, file_trials, targets
from fuzz.judge import EXPECTED_ENDS, limits, outcome_of, try_all
from fuzz.mutation import BYTE_CHANGES, change_bytes, change_values

FEW = 25


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_changed_files(target: Target) -> None:
    tally = try_all(file_trials(target, range(FEW)))
    assert not tally.faults
    assert tally.ends.total() == FEW


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_whole_files_are_taken(target: Target, tmp_path: Path) -> None:
    file = tmp_path / target.name
    file.write_bytes(target.content)
    target.read(file)
    if target.format:
        values = target.format.read(target.content)
        assert target.format.read(target.format.write(values)) == values


QUICK = [words for words in OPTIONS if words[0] in ("show", "data", "compare", "reproduce")]


@pytest.mark.parametrize("words", QUICK, ids=lambda words: " ".join(words)[:40])
def test_options(words: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = outcome_of_command(words, tmp_path)
    assert outcome.end == "refused", outcome.detail


def fails(error: BaseException) -> Callable[[], None]:
    """Something that goes wrong so."""

    def read() -> None:
        raise error

    return read


def late() -> None:
    with limits(0.05):
        time.sleep(5)


def test_what_is_found() -> None:
    assert outcome_of(lambda: None) == ("taken", "")
    assert outcome_of(fails(UserError("a line"))) == ("refused", "a line")
    assert outcome_of(fails(FileNotFoundError(2, "No such file", "a")))[0] == "refused"
    assert outcome_of(lambda: bytearray(2**33)).end == "MemoryError"
    assert outcome_of(late).end.startswith("late")
    bad = (KeyError("a"), RecursionError(), OSError("bare"), UserError(""), UserError("x" * 10_000), SystemExit(2))
    assert not {outcome_of(fails(error)).end for error in bad} & set(EXPECTED_ENDS)


def test_changes_are_known_by_their_seed() -> None:
    whole = bytes(range(256)) + b'{"a": 1234, "b": [1, 2]}'
    made = [change_bytes(whole, random.Random(n)) for n in range(200)]
    assert made == [change_bytes(whole, random.Random(n)) for n in range(200)]
    assert len(set(made)) > 150
    assert all(kind(bytearray(), random.Random(0)) is not None for kind in BYTE_CHANGES)
    values = [repr(change_values({"a": {"b": [1, {"c": 2}]}, "d": "e"}, random.Random(n))) for n in range(200)]
    assert len(set(values)) > 50
