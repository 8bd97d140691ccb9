"""Prompts of files are read as they stand there, or refused with their line."""

from pathlib import Path

import pytest

from dumo.encoders.caption import read_prompts
from dumo.types import UserError


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", "a café\n"), ("a.jsonl", '{"prompt": "a café"}\n')], ids=["txt", "jsonl"]
)
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["a café"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (r'{"prompt": "a \ud800"}', "half a character"),
        ('{"prompt": "a"', "not JSON"),
        ('{"prompt": " "}', "no prompt"),
        ('["a"]', "no prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a cat"}}\n{line}\n')
    with pytest.raises(UserError, match=f"a.jsonl line 2 .*{told}"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_table_is_refused_and_endings_are_read_in_either_case(tmp_path: Path) -> None:
    for name in ("a.json", "a.csv", "a.tsv", "a.PARQUET"):
        (tmp_path / name).write_text("prompt\na cat\n")
        with pytest.raises(UserError, match=f"{name} is no file of prompts: give a .txt"):
            read_prompts(tmp_path / name)
    (tmp_path / "a.JSONL").write_text('{"prompt": "a dog"}\n')
    (tmp_path / "b.TXT").write_text("a cat\n")
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.JSONL")] == ["a dog"]
    assert [prompt.text for prompt in read_prompts(tmp_path)] == ["a cat"]
