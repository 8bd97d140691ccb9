"""Files of prompts, as people and benchmarks keep them: a text per line, JSON lines, or a folder of text files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dumo.io.read import read_text
from dumo.types import UserError

WAY = "give a .txt with a prompt on each line, a .jsonl whose lines have a prompt, or a folder of .txt files"


@dataclass(frozen=True)
class Prompt:
    """A text to make images of, and a name for the files of its images."""

    name: str  # that of its file, or the number of its line, from 00000
    text: str
    line: str  # as in the file


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file or folder, in order; blank lines are left out. Raises UserError where there are none."""
    if not path.exists():
        raise UserError(f"there are no prompts {path}: {WAY}")
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        found = [Prompt(file.stem, " ".join((text := read_text(file, WAY)).split()), text) for file in files]
        if empty := next((file for file, one in zip(files, found, strict=True) if not one.text), None):
            raise UserError(f"{empty} is empty: write a prompt into it, or remove it")
    else:
        texts = _json(path) if path.suffix == ".jsonl" else ((line.strip(), line) for line in _lines(path))
        found = [Prompt(f"{i:05d}", text, line) for i, (text, line) in enumerate(texts)]
    if not found:
        raise UserError(f"{path} has no prompts: {WAY}")
    return found


def _lines(path: Path) -> Iterator[str]:
    return (line for line in read_text(path, WAY).split("\n") if line.strip())


def _json(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), 1):
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON ({error}): {WAY}") from error
        text = found.get("prompt") if isinstance(found, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path} line {number} has no prompt, as {{'prompt': 'a photo of a bench'}}: {WAY}")
        yield text.strip(), line
