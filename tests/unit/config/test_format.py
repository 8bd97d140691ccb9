"""A run.yaml says its format; a file that a person writes need not, and is none the worse for either."""

from pathlib import Path

import pytest

from dumo.config.format import FORMAT, upgrade
from dumo.config.load import dump, load
from dumo.types import UserError


def written(file: Path, text: str) -> str:
    """A file's path."""
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("name", ["run.yaml", "mine.yaml"])
@pytest.mark.parametrize("line", ["", f"format: {FORMAT}\n", "format: 1\n"])
def test_a_file_may_say_its_format(name: str, line: str, tmp_path: Path) -> None:
    run = load("digits", ["train.micro_batch=8"])
    text = dump(run).removeprefix(f"format: {FORMAT}\n")
    assert load(written(tmp_path / name, line + text)) == run
    assert load(written(tmp_path / name, f"{line}base: digits\ntrain: {{micro_batch: 8}}")) == run


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("format: 3", "run.yaml: format is 3, and this dumo reads up to 2: take a newer dumo"),
        ("format: 0", "run.yaml: format is 0: it is a number from 1 to 2"),
        ("format: two", "run.yaml: format is 'two': it is a number"),
        ("format: true", "run.yaml: format is True: it is a number"),
        ("format:", "run.yaml: format is None: it is a number"),
    ],
)
def test_a_format_that_is_none_of_ours(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as refused:
        load(written(tmp_path / "run.yaml", dump(load("digits")).replace(f"format: {FORMAT}", line)))
    assert "\n" not in str(refused.value)


def test_a_format_is_no_field() -> None:
    with pytest.raises(UserError, match="format: unknown key"):
        load("digits", [f"format={FORMAT}"])


@pytest.mark.parametrize(("pieces", "rows"), [(1, "null"), (2, "16"), (3, "11"), (32, "1")])
def test_pieces_of_format_1_are_rows_now(pieces: int, rows: str, tmp_path: Path) -> None:
    text = dump(load("digits")).removeprefix(f"format: {FORMAT}\n")
    old = text.replace("  micro_batch: null\n  share: 1\n  reshard: false\n", f"  accumulate: {pieces}\n")
    assert old != text
    now = load("digits", [f"train.micro_batch={rows}"])
    assert load(written(tmp_path / "run.yaml", old)) == now
    based = written(tmp_path / "mine.yaml", "base: run.yaml")
    assert load(based) == now


def test_what_a_person_writes_of_format_1_is_told_its_name(tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.yaml", "base: digits\ntrain:\n  accumulate: 4\n")
    with pytest.raises(UserError, match=r"mine.yaml: train.accumulate: unknown key; it is micro_batch now, the rows"):
        load(mine)
    with pytest.raises(UserError, match=r"objective.schedule: unknown key; it is discretization now$"):
        load("digits-ect", ["objective.schedule.q=3"])
    with pytest.raises(UserError, match=r"objective.schedule: unknown key; (?!it is)"):
        load("digits", ["objective.schedule.q=3"])  # which has nothing of the kind


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"train": None, "objective": "x"},
        {"train": {"accumulate": "two", "batch": 8}},
        {"train": {"accumulate": 2}},
        {"train": {"accumulate": 0, "batch": 8}},
        {"train": {"accumulate": 2, "batch": 8, "micro_batch": 4}},
        {"objective": {"kind": "dumo", "schedule": {}}},
        {"objective": {"kind": "consistency", "schedule": {}, "discretization": {}}},
    ],
)
def test_what_format_1_never_wrote_is_left(tree: dict[str, object]) -> None:
    before = repr(tree)
    upgrade(tree)
    assert repr(tree) == before
