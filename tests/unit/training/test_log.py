"""The log survives a torn write, and goes back to a checkpoint's step."""

from pathlib import Path

import pytest

from dumo.training.log import append, read_log, rewind
from dumo.types import UserError


def logged(path: Path, steps: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [{"step": n, "loss": 0.1 * n, "bins": {"v": [1.0, n]}} for n in range(1, steps + 1)]
    for row in rows:
        append(path, row)
    return rows


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """But for numbers that JSON cannot say; without a log there is nothing to read or to rewind."""
    path = tmp_path / "metrics.jsonl"
    rewind(path, 2)
    assert read_log(path) == []
    rows = logged(path, 3)
    append(path, {"step": 4, "a": float("nan"), "b": {"v": [1.0, float("inf")]}, "c": (-float("inf"), "nan")})
    assert read_log(path) == [*rows, {"step": 4, "a": None, "b": {"v": [1.0, None]}, "c": [None, "nan"]}]
    assert path.read_text().count("\n") == 4
    assert not {"NaN", "Infinity"} & set(path.read_text().replace('"', " ").split())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1', "\0\0\0"])
def test_rewind(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = logged(path, 4)
    with path.open("a") as file:
        file.write(torn)
    assert read_log(path) == rows

    rewind(path, 2)
    assert read_log(path) == rows[:2]
    append(path, {"step": 3})
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]
    rewind(path, 2)
    assert read_log(path) == rows[:2]
    assert [*tmp_path.iterdir()] == [path]


def test_a_whole_last_line_is_kept_without_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = logged(path, 2)
    path.write_text(path.read_text().removesuffix("\n"))
    rewind(path, 2)
    append(path, {"step": 3})
    assert read_log(path) == [*rows, {"step": 3}]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1', "\0\0\0"])
def test_a_row_takes_the_place_of_a_torn_one(tmp_path: Path, torn: str) -> None:
    """Also in speed.jsonl, which is never rewound."""
    path = tmp_path / "speed.jsonl"
    path.write_text(torn)
    append(path, {"step": 1})
    assert read_log(path) == [{"step": 1}]
    with path.open("a") as file:
        file.write(torn)
    append(path, {"step": 2})
    append(path, {"step": 3})
    assert read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("second", [b'{"step": 2', b'{"step": 2, "a": "\xff"}'])
def test_a_broken_line_inside_is_named(tmp_path: Path, second: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + second + b'\n{"step": 3}\n')
    for read in (read_log, lambda path: rewind(path, 1)):
        with pytest.raises(UserError):
            read(path)
    assert path.read_bytes().count(b"\n") == 3
