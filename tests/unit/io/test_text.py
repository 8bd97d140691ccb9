"""A file of text is read if it is one: no pipe that would be waited for, no device without an end, nothing huge."""

import os
from pathlib import Path

import pytest

from dumo.io.read import (
    MAX_FILE_BYTES,
    brief,
    cache_folder,
    parse_json,
    read_json,
    read_settings,
    read_text,
    text_lines,
    user_path,
    write_json,
)
from dumo.types import UserError


def test_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("é\n", encoding="utf-8")
    assert read_text(tmp_path / "a", "way out") == "é\n"
    (tmp_path / "a").write_text("é\n", encoding="utf-8-sig")
    assert read_text(tmp_path / "a", "way out") == "é\n"
    (tmp_path / "a.json").write_text('{"a": [1, null, "NaN"]}')
    assert read_json(tmp_path / "a.json", "way out") == {"a": [1, None, "NaN"]}
    with pytest.raises(UserError, match="b is not there: way out"):
        read_text(tmp_path / "b", "way out")


def test_what_is_no_text_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pipe, huge, other = tmp_path / "pipe", tmp_path / "huge", tmp_path / "other"
    os.mkfifo(pipe)
    with huge.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    other.write_bytes(b"a\xffb")
    for path, said in (
        (pipe, "is no file"),
        (tmp_path, "is no file"),
        (Path("/dev/zero"), "is no file"),
        (other, r"line 1 is not UTF-8 \(byte 0xff; iconv -f latin1 -t utf-8"),
    ):
        with pytest.raises(UserError, match=f"^{path} {said}.*: way out$"):
            read_text(path, "way out")
    with pytest.raises(UserError, match=r"67,108,865 bytes.* at most 67,108,864: way out$"):
        read_text(huge, "way out")


def test_lines_are_read_up_to_the_first_that_is_not_utf8(tmp_path: Path) -> None:
    (file := tmp_path / "a").write_bytes("\ufeffä\r\nb\n".encode() + b"\xffc\n")
    lines = text_lines(file, "way out")
    assert [next(lines), next(lines)] == ["ä\r\n", "b\n"]
    with pytest.raises(UserError, match=r"a line 3 is not UTF-8 \(byte 0xff; .*: way out$"):
        next(lines)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "NaN", '{"a": -Infinity}', "1e999", "9" * 5000, "\0"])
def test_what_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a.json is not JSON \(.*\): way out$"):
        read_json(tmp_path / "a.json", "way out")


@pytest.mark.parametrize("text", ["{", "NaN", '{"a": [-Infinity]}', "1e999", '{"a": -1e999}'])
def test_what_is_no_json_is_none_in_a_line_either(text: str) -> None:
    with pytest.raises(UserError, match=r"^a.jsonl line 3 is not JSON \(.*\): way out$"):
        parse_json(text, "a.jsonl line 3", "way out")
    assert parse_json("[1e308, -2.5, 10]", "", "") == [1e308, -2.5, 10]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "layers_per_block", "depth", "num_res_blocks"])
def test_a_config_with_more_layers_than_any_net_is_refused(tmp_path: Path, key: str) -> None:
    """Whatever else is counted by layer may be large."""
    file = tmp_path / "config.json"
    settings = {"text_config": {"vocab_size_per_layer_input": 262_144, key: 1000}}
    write_json(file, settings)
    assert read_settings(file, "way out") == settings
    write_json(file, {"text_config": {key: 1001}})
    with pytest.raises(UserError, match=f"{key} is above 1,000, which no net has: way out"):
        read_settings(file, "way out")


def test_numbers_that_are_not_finite_become_null_where_asked() -> None:
    text = '{"a": NaN, "b": [-Infinity, 1e999, 0.5]}'
    assert parse_json(text, "", "", nulls_nonfinite=True) == {"a": None, "b": [None, None, 0.5]}


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("$NOTHING", "empty"),
        ("a\0b", "NUL"),
        ("~nobody-here/x", "is ~nobody-here/x, and no such home is known"),
    ],
)
def test_what_is_no_path(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("NOTHING", "")
    assert user_path("~/data", "data.root") == Path("/home/somebody/data")
    with pytest.raises(UserError, match=rf"^data\.root .*{said}.*: .*set "):
        user_path(text, "data.root")
