"""Notes on a user's files: what was found out about them once, so that the next start need not look again.

A note is a safetensors file of tensors and a text, with their SHA-256. It is written whole or not at all, to the
`best_place` of `dumo.io.file.note_places`, by one process at a time: `locked` keeps the others out while one reads the
note and writes it anew. What is not as it was written counts as no note.
"""

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor

from dumo.io import digest, weights
from dumo.io import file as files

_KEY = "note"  # of the one entry in the file's metadata: two would come in any order

Note = tuple[dict[str, Tensor], str]


def read(place: Path) -> Note | None:
    """The tensors of a note, mapped into memory, and its text; None where there is no whole note."""
    if not os.path.lexists(place):
        return None
    try:
        tensors, about = weights.read(place)
        sha256, text = json.loads(about[_KEY])
        return (tensors, text) if sha256 == _digest(tensors, text) else None
    except Exception:  # a damaged file may raise anything in its readers
        return None


def write(place: Path, tensors: Mapping[str, Tensor], text: str) -> None:
    """Write a note of tensors and a text. Raises OSError."""
    about = {_KEY: json.dumps([_digest(tensors, text), text])}
    files.write(place, safetensors.torch.save(dict(tensors), about))


def best_place(places: list[Path]) -> Path | None:
    """The first of some places where a note may be written; None where there is none."""
    for place in places:
        if files.is_writable(place):
            return place
    return None


@contextmanager
def locked(place: Path) -> Generator[None]:
    """Keep other processes from writing the note at a place while inside. Raises OSError."""
    with files.locked(place.with_name(f"{place.name}.lock")):
        yield


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    return digest.short(text, digest.of_tensors(tensors))
