"""captions.jsonl beside latents: what is written of each image, a JSON list of texts to a line, in the images' order.

So training, and encoding the texts, need no images.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from dumo.texts.caption import Captions
from dumo.types import UserError

FILE = "captions.jsonl"
WAY = "remove it, and dumo encode writes it from the images"


def dump(captions: Captions) -> bytes:
    """As `read` reads it."""
    texts, ids, first, lines = captions.texts, captions.ids.tolist(), 0, list[str]()
    for end in captions.ends.tolist():
        told = [texts[k] for k in ids[first:end] if k < len(texts)]
        lines.append(json.dumps(told, ensure_ascii=False))
        first = end
    return "".join(f"{line}\n" for line in lines).encode()


def read(file: Path) -> Captions:
    """The captions by image. Raises UserError where there is no such file, or it is damaged."""
    if not file.is_file():
        raise UserError(f"{file} is not there, which has the images' captions: start the same dumo encode again")
    return Captions.of(_lines(file))


def require(file: Path, captions: Captions) -> None:
    """Raise UserError where a file is there that holds others."""
    if file.exists() and file.read_bytes() != dump(captions):
        raise UserError(f"{file} holds other captions than the images have now: {WAY}; runs of the old ones need it")


def _lines(file: Path) -> Iterator[list[str]]:
    with file.open(encoding="utf-8", errors="replace") as opened:
        for number, line in enumerate(opened, 1):
            try:
                told = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file} line {number} is not JSON ({error}): {WAY}") from error
            if not isinstance(told, list) or not all(isinstance(text, str) for text in told):
                raise UserError(f"{file} line {number} is no list of texts: {WAY}")
            yield told
