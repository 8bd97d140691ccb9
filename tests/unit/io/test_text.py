"""Texts and JSON are read as they stand there."""

from pathlib import Path

import pytest

from dumo.io.read import brief, cache_folder, read_json, read_text, text_lines, user_path, write_json


def test_text_is_read(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a").write_bytes("é\r\n".encode(encoding))
        assert read_text(tmp_path / "a") == "é\n"
        assert [*text_lines(tmp_path / "a")] == ["é\r\n"]
    (tmp_path / "a.json").write_text('{"a": [1, null, "NaN"]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "NaN"]}


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf"), 0.5]})
    assert read_json(tmp_path / "a.json") == {"a": None, "b": [None, 0.5]}


def test_a_long_text_is_cut() -> None:
    assert brief("x" * 200) == "x" * 200
    assert brief("x" * 201) == "x" * 200 + "…"
    assert brief([1, 2], 3) == "[1,…"


def test_the_cache_is_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for variable in ("DUMO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/dumo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/dumo")
    monkeypatch.setenv("DUMO_CACHE", "~/mine")
    assert cache_folder() == Path("/home/somebody/mine")
    assert user_path("~/data", "data.root") == Path("/home/somebody/data")
