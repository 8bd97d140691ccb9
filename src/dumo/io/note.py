"""Notes on a user's files: what was found out about them once, so that the next start need not look again.

A note is a safetensors file of tensors and a text, with their SHA-256. It is written whole or not at all, by one
process at a time, to the best of `dumo.io.file.note_places`. What is not as it was written counts as no note.
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

KEY = "note"  # of the file's one entry: two would come in any order

Note = tuple[dict[str, Tensor], str]


def read(place: Path) -> Note | None:
    """The tensors, mapped into memory, and the text; None where there is no whole note."""
    if not os.path.lexists(place):
        return None
    try:
        tensors, about = weights.read(place)
        sha256, text = json.loads(about[KEY])
        return (tensors, text) if sha256 == _digest(tensors, text) else None
    except Exception:  # a damaged file may raise anything in its readers
        return None


def write(place: Path, tensors: Mapping[str, Tensor], text: str) -> None:
    """Write a note. Raises OSError."""
    about = {KEY: json.dumps([_digest(tensors, text), text])}
    files.write(place, safetensors.torch.save(dict(tensors), about))


def best(places: list[Path]) -> Path | None:
    """The first of these places where a note may be written; None where none may."""
    return next(filter(files.writable, places), None)


@contextmanager
def held(place: Path) -> Generator[None]:
    """Keep other processes from writing a note meanwhile. Raises OSError."""
    with files.locked(place.with_name(f"{place.name}.lock")):
        yield


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    return digest.short(text, digest.of_tensors(tensors))
