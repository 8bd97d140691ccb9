"""Files that are changed are taken, or refused in plain words: a few of each kind; `run.py` tries thousands."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dumo.types import UserError
from fuzz import command
from fuzz.command import OPTIONS
from fuzz.judge import GOOD, limited, wrong
from fuzz.mutation import KINDS, mutated, replaced
from fuzz.run import tried
from fuzz.target import Target, targets

FEW = 25


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_changed_files(target: Target) -> None:
    ends, found = tried(target, range(FEW))
    assert not found
    assert ends.total() == FEW


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_whole_files_are_taken(target: Target, tmp_path: Path) -> None:
    file = tmp_path / target.name
    file.write_bytes(target.whole)
    target.read(file)
    if target.written:
        assert target.values(target.written(target.values(target.whole))) == target.values(target.whole)


QUICK = [words for words in OPTIONS if words[0] in ("show", "data", "compare", "reproduce")]


@pytest.mark.parametrize("words", QUICK, ids=lambda words: " ".join(map(str, words))[:40])
def test_options(words: Sequence[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    end, said = command.wrong(words, tmp_path)
    assert end == "refused", said


def fails(error: BaseException) -> Callable[[], None]:
    """Something that goes wrong so."""

    def read() -> None:
        raise error

    return read


def late() -> None:
    with limited(0.05):
        time.sleep(5)


def test_what_is_found() -> None:
    assert wrong(lambda: None) == ("taken", "")
    assert wrong(fails(UserError("a line"))) == ("refused", "a line")
    assert wrong(fails(FileNotFoundError(2, "No such file", "a")))[0] == "refused"
    assert wrong(lambda: bytearray(2**33))[0] == "MemoryError"
    assert wrong(late)[0].startswith("late")
    bad = (KeyError("a"), RecursionError(), OSError("bare"), UserError(""), UserError("x" * 10_000), SystemExit(2))
    assert not {wrong(fails(error))[0] for error in bad} & set(GOOD)


def test_changes_are_known_by_their_seed() -> None:
    whole = bytes(range(256)) + b'{"a": 1234, "b": [1, 2]}'
    made = [mutated(whole, random.Random(n)) for n in range(200)]
    assert made == [mutated(whole, random.Random(n)) for n in range(200)]
    assert len(set(made)) > 150
    assert all(kind(bytearray(), random.Random(0)) is not None for kind in KINDS)
    values = [repr(replaced({"a": {"b": [1, {"c": 2}]}, "d": "e"}, random.Random(n))) for n in range(200)]
    assert len(set(values)) > 50
