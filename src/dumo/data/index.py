"""Where images lie in tar archives: found once, written next to the archives, and mapped into memory from then on.

    .dumo-index/index.json    of each archive name, size, time of its last change, number of images; SHA-256 of the rest
    .dumo-index/members.npy   int64 (4, n), a column per image: its beginning, its size, its class, its name's end
    .dumo-index/names.npy     uint8, the images' names, one after the other

Finding them takes a read per member of each archive, hours for a hundred million; opening an index takes three files,
however many images there are. An archive of another size or time than noted is looked through again, and it alone; an
index that has changed is made again. Where the archives' folder may not be written to,
the index lies in the user's cache folder (`dumo.io.file.places`); where that may not either, it is kept in memory.
"""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dumo.io import digest
from dumo.io import file as files
from dumo.runtime import signals
from dumo.runtime.progress import late
from dumo.types import UserError

NAME, FILES, FORMAT = ".dumo-index", ("members", "names"), 1
UNLABELLED = -(2**63)  # in place of a class

Members = NDArray[np.int64]  # (4, n): start, size, label, name
Names = NDArray[np.uint8]


@dataclass(frozen=True)
class Scan:
    """Images of one archive, or of several one after the other."""

    members: Members
    names: Names
    wrong: str = ""  # of one archive: what is wrong with its labels, if anything is


@dataclass(frozen=True)
class Part:
    """An archive, as it was when it was looked through."""

    file: str  # below the folder that holds all archives
    size: int
    changed: int  # ns
    images: int = 0
    wrong: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """By what it is known again."""
        return self.file, self.size, self.changed


@dataclass(frozen=True)
class Index:
    """Some archives, and the images that lie in them."""

    parts: tuple[Part, ...]
    firsts: tuple[int, ...]  # the column of each one's first image
    scan: Scan

    def of(self, k: int) -> Scan:
        """Archive k alone."""
        first, part = self.firsts[k], self.parts[k]
        last = first + part.images
        begin, end = (int(self.scan.members[3, i - 1]) if i else 0 for i in (first, last))
        members = self.scan.members[:, first:last] - np.array([[0], [0], [0], [begin]])
        return Scan(members, self.scan.names[begin:end], part.wrong)

    @property
    def classes(self) -> NDArray[np.int64]:
        """Of all images, one after the other; mapped where the archives are neighbours in the index."""
        column, spans = self.scan.members[2], list(zip(self.firsts, self.parts, strict=True))
        if all(first + part.images == then for (first, part), then in zip(spans, self.firsts[1:], strict=False)):
            return np.asarray(column[self.firsts[0] : spans[-1][0] + spans[-1][1].images])
        return np.concatenate([column[first : first + part.images] for first, part in spans])

    def name(self, column: int) -> str:
        """An image's in its archive."""
        begin = int(self.scan.members[3, column - 1]) if column else 0
        return self.scan.names[begin : int(self.scan.members[3, column])].tobytes().decode(errors="replace")


def open_index(archives: Sequence[str], look: Callable[[str], Scan]) -> Index:
    """The images of these archives: of those that an index knows from there, of the others as `look` finds them.

    Archives that were looked through are noted, even where `look` raises on a later one.
    """
    above = Path(os.path.commonpath([os.path.dirname(file) for file in archives]))
    wanted = [_state(file, above) for file in archives]
    places = files.places(above, NAME)
    for place in places:
        if found := _covering(read(place), wanted):
            return found
    place = next(filter(files.writable, places), None)
    with files.locked(place.with_name(f"{place.name}.lock")) if place else nullcontext():
        old = read(place) if place else None
        return _covering(old, wanted) or _made(place, above, old, wanted, look)


def read(place: Path) -> Index | None:
    """The index in a folder; None where there is none, or it is not as it was written."""
    try:
        found: dict[str, Any] = json.loads((place / "index.json").read_bytes())
        parts = tuple(Part(**part) for part in found["parts"])
        # mapped, and copied where it is written to: torch takes no array that may not be
        members, names = (np.load(place / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in FILES)
        whole = (found["format"], found["sha256"]) == (FORMAT, _digest(parts, members, names))
    except Exception:  # a damaged file may raise anything in its readers
        return None
    return _index(parts, Scan(members, names)) if whole else None


def write(place: Path, index: Index) -> None:
    """Write an index whole. Raises OSError."""
    members, names = index.scan.members, index.scan.names
    with files.whole(place) as half:
        half.mkdir()
        np.save(half / "members.npy", members, allow_pickle=False)
        np.save(half / "names.npy", names, allow_pickle=False)
        head = {"format": FORMAT, "sha256": _digest(index.parts, members, names)}
        (half / "index.json").write_text(json.dumps({**head, "parts": [asdict(part) for part in index.parts]}))


def _state(file: str, above: Path) -> Part:
    about = os.stat(file)
    return Part(os.path.relpath(file, above), about.st_size, about.st_mtime_ns)


def _covering(found: Index | None, wanted: Sequence[Part]) -> Index | None:
    """The archives that are wanted, if the index has them all, as they are."""
    at = {part.key: k for k, part in enumerate(found.parts)} if found else {}
    if not found or any(part.key not in at for part in wanted):
        return None
    chosen = [at[part.key] for part in wanted]
    return Index(tuple(found.parts[k] for k in chosen), tuple(found.firsts[k] for k in chosen), found.scan)


def _made(
    place: Path | None, above: Path, old: Index | None, wanted: Sequence[Part], look: Callable[[str], Scan]
) -> Index:
    """Look through those that `old` does not know; note them with what it knows that is still there."""
    known = {part.file: (part, old.of(k)) for k, part in enumerate(old.parts)} if old else {}
    known = {file: entry for file, entry in known.items() if (above / file).exists()}
    try:
        with late("looking through tar archives", len(wanted)) as tick:
            for k, part in enumerate(wanted):
                signals.check()
                if part.file not in known or known[part.file][0].key != part.key:
                    scan = look(str(above / part.file))
                    known[part.file] = Part(*part.key, scan.members.shape[1], scan.wrong), scan
                tick(k + 1, "")
    finally:
        whole = concatenate([known[file] for file in sorted(known)])
        try:
            if place:
                write(place, whole)
        except OSError as error:
            warnings.warn(f"{place} cannot be written ({error.strerror}): the next start looks again", stacklevel=2)
    found = _covering((place and read(place)) or whole, wanted)  # what was read is mapped
    if found is None:
        raise UserError(f"archives in {above} change while they are read: start again when they are whole")
    return found


def concatenate(entries: Sequence[tuple[Part, Scan]]) -> Index:
    """Archives one after the other, in memory."""
    begins = [0, *accumulate(len(scan.names) for _, scan in entries)]
    moved = [scan.members + np.array([[0], [0], [0], [b]]) for (_, scan), b in zip(entries, begins, strict=False)]
    members = np.concatenate([np.zeros((4, 0), np.int64), *moved], 1)
    names = np.concatenate([np.zeros(0, np.uint8), *(scan.names for _, scan in entries)])
    return _index(tuple(part for part, _ in entries), Scan(members, names))


def _index(parts: tuple[Part, ...], scan: Scan) -> Index:
    return Index(parts, tuple(accumulate((part.images for part in parts), initial=0))[:-1], scan)


def _digest(parts: Sequence[Part], *arrays: NDArray[Any]) -> str:
    described = json.dumps([asdict(part) for part in parts])
    whole = (np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays)
    return digest.of_bytes(described.encode(), *(f"{array.shape} {array.dtype}".encode() for array in arrays), *whole)
