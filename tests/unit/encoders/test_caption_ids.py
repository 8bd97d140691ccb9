"""Prompts of files are read as they stand there, or refused with their line."""

from pathlib import Path

import pytest

from dumo.encoders.caption_ids import edit_caption, read_prompts, split_caption


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", "a café\n"), ("a.jsonl", '{"prompt": "a café"}\n')], ids=["txt", "jsonl"]
)
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["a café"]


def test_prompts_are_numbered_without_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\na cat\n \na dog\n")
    assert [(prompt.name, prompt.text) for prompt in read_prompts(tmp_path / "a.txt")] == [
        ("00000", "a cat"),
        ("00001", "a dog"),
    ]


@pytest.mark.parametrize("text", ["make it red", "two\x1dparts", f"two\x1d{'a' * 63}"])
def test_a_caption_edits_an_image_if_it_ends_with_a_hash(text: str) -> None:
    """Whatever the text holds, nothing of it is lost."""
    assert split_caption(text) == (text, "")
    assert split_caption(edit_caption(text, "a" * 64)) == (text, "a" * 64)


def test_endings_are_read_in_either_case(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_text('{"prompt": "a dog"}\n')
    (tmp_path / "b.TXT").write_text("a cat\n")
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.JSONL")] == ["a dog"]
    assert [prompt.text for prompt in read_prompts(tmp_path)] == ["a cat"]
