"""The captions of a data set, where each distinct text has a number, as a class has; and files of prompts.

A condition c is the number of a caption; the number after the last means no caption. People and benchmarks keep prompts
as a text per line, as JSON lines, or as a folder of text files.

What a model that edits images is conditioned on is a text and an image: a caption with the image's SHA-256 at its end.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.io import digest
from dumo.io.read import is_unicode, read_text
from dumo.runtime.random import stream
from dumo.types import UserError

EDITS = "\x1d"  # ASCII's group separator: between a text and the hash of the image that it edits
WAY = "give a .txt with a prompt on each line, a .jsonl whose lines have a prompt, or a folder of .txt files"


def edit(text: str, sha256: str) -> str:
    """The caption that edits an image of this hash by a text."""
    return f"{text.strip()}{EDITS}{sha256}"


def parted(caption: str) -> tuple[str, str]:
    """The text of a caption, and the hash of the image that it edits; "": it edits none."""
    text, _, sha256 = caption.partition(EDITS)
    return text, sha256


@dataclass(frozen=True)
class Captions:
    """Distinct texts, and the numbers of each image's. Caption k is `texts[k]`; number `len(texts)` is no caption.

    An image has at least one number: that of no caption where it has none, or only blank ones.
    """

    texts: tuple[str, ...]  # distinct, none blank
    ids: Int64[Tensor, " m"]  # numbers of captions, image by image
    ends: Int64[Tensor, " n"]  # the end of image i's numbers in `ids`

    @classmethod
    def of(cls, images: Iterable[Sequence[str]]) -> "Captions":
        """Number the captions of each image, in order of first appearance, stripped of surrounding blanks."""
        numbers: dict[str, int] = {}
        listed: list[int] = []
        ends: list[int] = []
        for captions in images:
            stripped = [text.strip() for text in captions] or [""]
            listed += [numbers.setdefault(text, len(numbers)) if text else -1 for text in stripped]
            ends.append(len(listed))
        ids = torch.tensor(listed, dtype=torch.long)
        return cls(tuple(numbers), ids.where(ids >= 0, len(numbers)), torch.tensor(ends, dtype=torch.long))

    def __len__(self) -> int:
        """The number of texts."""
        return len(self.texts)

    @property
    def counts(self) -> Int64[Tensor, " n"]:
        """The number of captions of each image, at least 1."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def first(self, images: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The first caption of each of these images."""
        return self.ids[self.ends[images] - self.counts[images]]

    def drawn(
        self, images: Int64[Tensor, " b"], *key: int | str, batch: int, rows: slice = slice(None)
    ) -> Int64[Tensor, " b"]:
        """One of the captions of each image, all equally likely, by random numbers of the key.

        The images are at the places `rows` of a batch of `batch` rows, so each rank draws for its own alone.
        """
        u = torch.rand(batch, dtype=torch.float64, generator=stream(*key, "caption"))[rows]
        counts = self.counts[images]
        return self.ids[self.ends[images] - counts + (u * counts).long()]

    def digest(self) -> str:
        """A short digest of the texts in their order: captions of the same digest have the same numbers."""
        return digest.short(*self.texts)


@dataclass(frozen=True)
class Prompt:
    """A text to make images of, and a name for the files of its images."""

    name: str  # that of its file, or the number of its line, from 00000
    text: str
    line: str  # as in the file


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file or folder, in order; blank lines are left out. Raises UserError where there are none."""
    if path.is_dir():
        prompts: list[Prompt] = []
        for file in sorted(path.glob("*.txt")):
            text = read_text(file, WAY)
            prompt = Prompt(file.stem, " ".join(text.split()), text)
            if not prompt.text:
                raise UserError(f"{file} is empty: write a prompt into it, or remove it")
            prompts.append(prompt)
    elif path.exists():
        texts = _json(path) if path.suffix == ".jsonl" else ((line.strip(), line) for line in _lines(path))
        prompts = [Prompt(f"{i:05d}", text, line) for i, (text, line) in enumerate(texts)]
    else:
        raise UserError(f"there are no prompts {path}: {WAY}")
    if not prompts:
        raise UserError(f"{path} has no prompts: {WAY}")
    return prompts


def _lines(path: Path) -> Iterator[str]:
    return (line for line in read_text(path, WAY).split("\n") if line.strip())


def _json(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), 1):
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON ({error}): {WAY}") from error
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path} line {number} has no prompt, as {{'prompt': 'a photo of a bench'}}: {WAY}")
        if not is_unicode(text):
            raise UserError(f"{path} line {number} has a prompt with half a character, a lone surrogate: {WAY}")
        yield text.strip(), line
