"""Number captions, which are then the condition c of a text-conditional net, and read prompt files.

- `Captions` numbers the distinct captions of a data set: c is the number of a caption, and the number after the last
  means no caption. `Captions.from_images` numbers them; `draw` and `first_of` choose one caption for each image of a
  batch.
- A caption of an image-editing model has a text and a source image: `edit_caption` joins the text and the image's
  SHA-256, and `split_caption` splits them.
- `read_prompts` reads prompts from a file with a text per line, from JSON lines, or from a folder of text files.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.io import digest
from dumo.io.read import parse_json, read_text
from dumo.runtime.random import stream
from dumo.types import UserError

# Separates a text from the hash of the image that it edits: the group separator of ASCII, which texts may also contain.
_EDIT_SEPARATOR = "\x1d"
_SHA256 = re.compile("[0-9a-f]{64}")
_PROMPTS_HINT = "give a .txt with a prompt on each line, a .jsonl whose lines have a prompt, or a folder of .txt files"
_TABLE_SUFFIXES = (".json", ".csv", ".tsv", ".parquet")  # not line-based prompt files


def edit_caption(text: str, sha256: str) -> str:
    """Return the caption that edits the image of this SHA-256 by a text."""
    return f"{text.strip()}{_EDIT_SEPARATOR}{sha256}"


def split_caption(caption: str) -> tuple[str, str]:
    """Return the text of a caption, and the SHA-256 of the image that it edits, or "".

    A caption edits an image if it ends with the separator and a SHA-256.
    """
    text, separator, sha256 = caption.rpartition(_EDIT_SEPARATOR)
    if separator and _SHA256.fullmatch(sha256):
        return text, sha256
    return caption, ""


@dataclass(frozen=True)
class Captions:
    """The distinct captions of n images, and the caption numbers of each image.

    Caption k is `texts[k]`, and the number `len(texts)` means no caption. Blank captions are omitted. Each
    image has at least one number.
    """

    texts: tuple[str, ...]  # distinct, none blank
    ids: Int64[Tensor, " m"]  # caption numbers, concatenated over images
    ends: Int64[Tensor, " n"]  # the end of each image's numbers in `ids`

    @classmethod
    def from_images(cls, captions_by_image: Iterable[Sequence[str]]) -> "Captions":
        """Number captions in the order of first appearance, after stripping whitespace."""
        number_of_text: dict[str, int] = {}
        ids: list[int] = []
        ends: list[int] = []
        for captions in captions_by_image:
            texts = [text for text in map(str.strip, captions) if text]
            for text in texts:
                ids.append(number_of_text.setdefault(text, len(number_of_text)))
            if not texts:
                ids.append(-1)  # no caption; replaced below by len(texts)
            ends.append(len(ids))
        no_caption = len(number_of_text)
        id_tensor = torch.tensor(ids, dtype=torch.long)
        return cls(
            texts=tuple(number_of_text),
            ids=id_tensor.where(id_tensor >= 0, no_caption),
            ends=torch.tensor(ends, dtype=torch.long),
        )

    def __len__(self) -> int:
        """Return the number of distinct captions."""
        return len(self.texts)

    @property
    def counts(self) -> Int64[Tensor, " n"]:
        """The number of captions of each image, at least 1."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    def first_of(self, images: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """Return the number (b,) of the first caption of each image (b,)."""
        return self.ids[self.ends[images] - self.counts[images]]

    def draw(
        self, images: Int64[Tensor, " b"], *key: int | str, batch: int, rows: slice = slice(None)
    ) -> Int64[Tensor, " b"]:
        """Draw one caption of each image (b,) uniformly, and return its number (b,).

        `key` seeds the random numbers. The images are the `rows` of a batch of `batch` rows, so that the result does
        not depend on how a batch is divided among ranks.
        """
        u = torch.rand(batch, dtype=torch.float64, generator=stream(*key, "caption"))[rows]
        counts = self.counts[images]
        return self.ids[self.ends[images] - counts + (u * counts).long()]

    def digest(self) -> str:
        """Return a short digest of the captions, in order."""
        return digest.short(*self.texts)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and a name for the files of its images."""

    name: str  # the stem of its file, or its number among non-blank lines, from 00000
    text: str
    line: str  # the unparsed line


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file or folder, in order, without blank lines.

    Raises UserError if there are none, if the file is a table, if a file in the folder is empty, or if a JSON line has
    no prompt.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        prompts = _read_folder(path)
    elif suffix == ".jsonl":
        prompts = _read_json_lines(path)
    elif suffix in _TABLE_SUFFIXES:  # do not read its lines as prompts
        raise UserError(f"{path} is not a file of prompts: {_PROMPTS_HINT}")
    else:
        lines = _nonblank_lines(path).values()
        prompts = [Prompt(_line_name(i), line.strip(), line) for i, line in enumerate(lines)]
    if not prompts:
        raise UserError(f"{path} has no prompts: {_PROMPTS_HINT}")
    return prompts


def _read_folder(folder: Path) -> list[Prompt]:
    """Read a prompt from each .txt file of a folder, sorted by name. Raises UserError for an empty file."""
    prompts: list[Prompt] = []
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() == ".txt"):
        content = read_text(file)
        text = " ".join(content.split())
        if not text:
            raise UserError(f"{file} is empty: write a prompt into it, or remove it")
        prompts.append(Prompt(file.stem, text, content))
    return prompts


def _read_json_lines(file: Path) -> list[Prompt]:
    """Read a prompt from each JSON line. Raises UserError for a line without a prompt or with invalid JSON."""
    prompts: list[Prompt] = []
    for i, (number, line) in enumerate(_nonblank_lines(file).items()):
        line_place = f"{file} line {number}"
        row = parse_json(line, line_place)
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{line_place} has no prompt, such as {{'prompt': 'a photo of a bench'}}: {_PROMPTS_HINT}")
        prompts.append(Prompt(_line_name(i), text.strip(), line))
    return prompts


def _nonblank_lines(file: Path) -> dict[int, str]:
    """Return the non-blank lines of a file by line number, from 1."""
    lines = read_text(file).split("\n")
    return {number: line for number, line in enumerate(lines, start=1) if line.strip()}


def _line_name(i: int) -> str:
    """Return the name of the prompt on the i-th non-blank line: 00000 for the first."""
    return f"{i:05d}"
