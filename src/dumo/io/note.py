"""Notes on a user's files: what was found out about them once, so that the next start need not look again.

A note is a safetensors file of tensors and a text, with the first 64 bits of their SHA-256. What is not as it was
written counts as no note.

1. `places_for` says where the note on a folder may lie, and `best_place` at which of these it can be written.
2. `locked` keeps other processes out while one reads the note (`read`) and writes it anew (`write`).
"""

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
from torch import Tensor

from dumo.error import UserError
from dumo.io import digest, guard, weights
from dumo.io import file as files
from dumo.io.read import cache_folder

_KEY = "note"  # of the one entry in the file's metadata: two would come in any order

Note = tuple[dict[str, Tensor], str]


def places_for(folder: Path, name: str) -> list[Path]:
    """The places of a note on the files of a folder, the best first: to look for it, and to write it.

    The first is next to the files; `name` hides it. The other is in the cache (`dumo.io.read.cache_folder`), by a hash
    of the folder's path; there is none where the user has no home.
    """
    places = [folder / name]
    with suppress(UserError):
        places.append(cache_folder() / digest.short(str(folder.resolve())) / name.removeprefix("."))
    return places


def read(place: Path) -> Note | None:
    """The tensors of a note, mapped into memory, and its text; None where there is no whole note."""
    if not os.path.lexists(place):
        return None
    try:
        tensors, about = weights.read(place)
        noted_digest, text = json.loads(about[_KEY])
        return (tensors, text) if noted_digest == _digest(tensors, text) else None
    except Exception:  # a damaged file may raise anything in its readers
        return None


def write(place: Path, tensors: Mapping[str, Tensor], text: str) -> None:
    """Write a note of tensors and a text. Raises OSError."""
    about = {_KEY: json.dumps([_digest(tensors, text), text])}
    files.write(place, safetensors.torch.save(dict(tensors), about))


def best_place(places: list[Path]) -> Path | None:
    """The first of some places where a note may be written; None where there is none."""
    for place in places:
        if is_writable(place):
            return place
    return None


def is_writable(place: Path) -> bool:
    """Whether a file may be written at a place. Makes the folders above it."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place.parent, os.W_OK | os.X_OK)


@contextmanager
def locked(place: Path) -> Generator[None]:
    """Keep other processes from writing the note at a place while inside. Raises OSError."""
    with guard.locked(place.with_name(f"{place.name}.lock")):
        yield


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    return digest.short(text, digest.of_tensors(tensors))
