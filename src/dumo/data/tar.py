"""Webdataset shards: tar archives in which `0001.jpg` and `0001.cls` are one sample, an image and its class number.

An archive that was cut short, or has a hole of zeros, looks whole to a reader that stops at the first thing that is no
header. So it must end as tar ends it: with a block of zeros where the members end, and nothing but zeros after it, no
more than fill its last record. Where the members lie is found once (`dumo.data.index`).
"""

import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from dumo.data import index
from dumo.data.index import UNLABELLED, Scan
from dumo.data.pixel import SUFFIXES, Unreadable
from dumo.data.store import Labels, counted, require_small
from dumo.io import digest
from dumo.runtime import signals
from dumo.runtime.progress import late
from dumo.types import UserError

# Of tar's records: 20 blocks by default, else, on request, a power of two of them, up to a MiB.
RECORDS = (tarfile.RECORDSIZE, *(tarfile.BLOCKSIZE << k for k in range(12)))
CLASS = 100  # bytes, at most, of what says a class
TEXT = 2**20  # bytes, at most, of a text that goes with an image: ours
AGAIN = "fetch it again, or remove it"


class Tar:
    """The images of some archives, in their order there, to be read at random.

    Raises UserError for a file that is no whole archive, and where only some images have a label.
    """

    def __init__(self, files: Sequence[str], *, labelled: bool) -> None:
        self.files, self.index = files, index.open_index(files, scan)
        self.ends = list(accumulate(part.images for part in self.index.parts))
        self.labels = self._labels() if labelled else None

    def __len__(self) -> int:
        return self.ends[-1]

    def fingerprint(self) -> str:
        """Of the archives' names and sizes, and of the names, places and classes in them."""
        sizes = (f"{part.file} {part.size}" for part in self.index.parts)
        scans = (self.index.of(k) for k in range(len(self.files)))
        return digest.short(*sizes, *(digest.of_bytes(scan.members.tobytes(), scan.names.tobytes()) for scan in scans))

    def path(self, i: int) -> str:
        """The archive and the member."""
        k, column = self._place(i)
        return f"{self.files[k]} member {self.index.name(column)}"

    def read(self, i: int) -> bytes:
        """The member's bytes. Raises OSError, and Unreadable where the archive has become shorter."""
        k, column = self._place(i)
        start, size = self.index.scan.members[:2, column].tolist()
        require_small(size)
        with open(self.files[k], "rb") as archive:
            archive.seek(start)
            data = archive.read(size)
        if len(data) < size:
            raise Unreadable("is cut off: its archive has become shorter")
        return data

    def texts(self, suffixes: Sequence[str]) -> list[dict[str, bytes]]:
        """What the members of these endings say of each image, by ending. All archives are gone through anew."""
        found: list[dict[str, bytes]] = []
        with late("looking for captions in tar archives", len(self.files)) as tick:
            for k, file in enumerate(self.files):
                signals.check()
                texts: dict[str, dict[str, bytes]] = {}
                for info, content in _members(file, suffixes, TEXT):
                    if content is not None:
                        texts.setdefault(_key(info.name), {})[info.name.rpartition(".")[2]] = content
                first = self.index.firsts[k]
                names = (self.index.name(first + i) for i in range(self.index.parts[k].images))
                found += [texts.get(_key(name), {}) for name in names]
                tick(k + 1, "")
        return found

    def _place(self, i: int) -> tuple[int, int]:
        """The archive of image i, and its column in the index."""
        k = bisect_right(self.ends, i)
        return k, self.index.firsts[k] + i - (self.ends[k] - self.index.parts[k].images)

    def _labels(self) -> Labels | None:
        """The classes; None where no image has one."""
        c = torch.from_numpy(self.index.classes)
        lacking = c == UNLABELLED
        wrong = next((part.wrong for part in self.index.parts if part.wrong), None)
        if not wrong and bool(lacking.all()):
            return None
        if not wrong and bool(lacking.any()):
            first = int(lacking.nonzero()[0])
            key = _key(self.index.name(self._place(first)[1]))
            wrong = f"{self.path(first)} has no label '{key}.cls', others have: set data.labelled=false"
        if wrong:
            raise UserError(wrong)
        return counted(c, self.files[0])


def scan(file: str) -> Scan:
    """Where the images of an archive lie. Raises UserError where it is damaged, OSError where it cannot be read."""
    found: list[tuple[int, int, int]] = []
    names: list[bytes] = []
    keys: list[str] = []
    classes: dict[str, int] = {}
    wrong = ""
    for info, content in _members(file, ("cls",), CLASS):
        if content is None:
            found.append((info.offset_data, info.size, len(info.name.encode(errors="replace"))))
            names.append(info.name.encode(errors="replace"))
            keys.append(_key(info.name))
        else:
            try:
                classes[_key(info.name)] = _number(content)
            except ValueError:
                wrong = wrong or f"{file} member {info.name} holds no class number: {content[:20]!r}"
    start, size, length = np.array(found, np.int64).reshape(-1, 3).T
    label = np.array([classes.get(key, UNLABELLED) for key in keys], np.int64)
    members = np.stack([start, size, label, length.cumsum()])
    return Scan(members, np.frombuffer(b"".join(names), np.uint8), wrong)


def _members(file: str, read: Sequence[str], most: int) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Images with None, those that end in `read` with what they say, `most` bytes of it.

    Raises UserError where the archive does not end as one does.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            while info := archive.next():
                setattr(archive, "members", [])  # noqa: B010, it is not typed. They would be kept, a kilobyte each
                if info.size < 0 or info.issparse():
                    raise UserError(f"{file} is damaged, or sparse, at byte {info.offset}: {AGAIN}")
                stem, _, suffix = PurePosixPath(info.name).name.partition(".")
                if not info.isfile() or not stem:
                    continue
                if f".{suffix.lower()}" in SUFFIXES:
                    yield info, None
                elif suffix in read and (content := archive.extractfile(info)):
                    yield info, content.read(most)
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{file} is no whole tar archive: {error}; {AGAIN}") from error
    _check_end(file, end)


def _check_end(file: str, end: int) -> None:
    """Raise UserError unless zeros stand after the members, one block at least and no more than a record takes."""
    size = os.stat(file).st_size
    with Path(file).open("rb") as archive:
        archive.seek(end)
        first = archive.read(tarfile.BLOCKSIZE)
        broken = len(first) < tarfile.BLOCKSIZE or any(first)  # where tarfile stops without a word
        more = not broken and any(any(piece) for piece in iter(lambda: archive.read(2**20), b""))
    zeros = size - end
    if broken:
        wrong = f"is broken off or damaged at byte {end}: {AGAIN}"
    elif more:
        where = "or is several that were laid end to end: write those as one"
        wrong = f"goes on after its end at byte {end}: it is damaged ({AGAIN}), {where}"
    elif not any(size % record == 0 and zeros <= record + 2 * tarfile.BLOCKSIZE for record in RECORDS):
        missing = "more than tar writes at its end: a part of it is missing"
        wrong = f"holds {zeros} zeros from byte {end} on, {missing}; {AGAIN}"
    else:
        return
    raise UserError(f"{file} {wrong}")


def _key(name: str) -> str:
    """What an image and its label have in common: the name without its endings."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0]))


def _number(content: bytes) -> int:
    """A class number. Raises ValueError for what is none that 63 bits hold."""
    if not -(2**63) < (number := int(content)) < 2**63:
        raise ValueError
    return number
