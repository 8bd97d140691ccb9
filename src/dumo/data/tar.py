"""Webdataset shards: tar archives in which `0001.jpg` and `0001.cls` are one sample, an image and its class number.

An archive that was cut short, or has a hole of zeros, looks whole to a reader that stops at the first thing that is no
header. So it must end as tar ends it: with a block of zeros where the members end, and nothing but zeros after it, no
more than fill its last record.

Finding the members takes a read for each, hours for a hundred million. So it is done once, and what was found lies in
`.dumo-index/<archive>.safetensors` next to the archive, from where it is mapped into memory. An archive of another size
or time than noted there is looked through again. Where its folder may not be written to, notes lie in the user's cache
folder (`dumo.io.file.places`); where that may not either, what was found is kept in memory.
"""

import json
import os
import tarfile
import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dumo.data.pairing import normal_form
from dumo.data.pixel import SUFFIXES, Unreadable
from dumo.data.store import Labels, counted, require_small
from dumo.io import digest, note
from dumo.io import file as files
from dumo.io.seen import Files, states_of
from dumo.runtime import signals
from dumo.runtime.progress import late
from dumo.types import UserError

# Of tar's records: 20 blocks by default, else, on request, a power of two of them, up to a MiB.
RECORDS = (tarfile.RECORDSIZE, *(tarfile.BLOCKSIZE << k for k in range(12)))
CLASS = 100  # bytes, at most, of what says a class
TEXT = 2**20  # bytes, at most, of a text that goes with an image: ours
AGAIN = "fetch it again, or remove it"
NAME = ".dumo-index"
MAPPED = 2**14  # notes mapped at a time, of more the rest is read; Linux allows 65,530 maps. Ours
UNLABELLED = -(2**63)  # in place of a class


@dataclass(frozen=True)
class Scan:
    """Where the images of an archive lie."""

    members: Int64[Tensor, "4 n"]  # of each its beginning, its size, its class, the end of its name
    names: UInt8[Tensor, " m"]  # one after the other
    wrong: str = ""  # what is wrong with the labels, if anything is

    def __len__(self) -> int:
        return self.members.shape[1]

    def name(self, i: int) -> str:
        """The name of an image in the archive."""
        begin, end = int(self.members[3, i - 1]) if i else 0, int(self.members[3, i])
        return self.names[begin:end].numpy().tobytes().decode(errors="replace")

    def copy(self) -> "Scan":
        """The same, not mapped."""
        return Scan(self.members.clone(), self.names.clone(), self.wrong)


class Tar:
    """The images of some archives, in their order there, to be read at random.

    Raises UserError for a file that is no whole archive, and where only some images have a label.
    """

    def __init__(self, archives: Sequence[str], *, labelled: bool) -> None:
        self.files, self.scans = archives, list[Scan]()
        with late("looking through tar archives", len(archives)) as tick:
            for k, file in enumerate(archives):
                signals.check()
                self.scans.append(look(file) if k < MAPPED else look(file).copy())
                tick(k + 1, "")
        self.ends = list(accumulate(map(len, self.scans)))
        self.within = Files.of(archives, states_of(archives), [*map(len, self.scans)])
        self.labels = self._labels() if labelled else None

    def __len__(self) -> int:
        return self.ends[-1]

    def fingerprint(self) -> str:
        """Of the archives' names and sizes, and of the names, places and classes in them."""
        above = os.path.commonpath([os.path.dirname(file) for file in self.files])
        sizes = (f"{os.path.relpath(file, above)} {os.path.getsize(file)}" for file in self.files)
        found = (digest.of_bytes(scan.members.numpy().tobytes(), scan.names.numpy().data) for scan in self.scans)
        return digest.short(*sizes, *found)

    def path(self, i: int) -> str:
        """The archive and the member."""
        k, column = self._place(i)
        return f"{self.files[k]} member {self.scans[k].name(column)}"

    def read(self, i: int) -> bytes:
        """The member's bytes. Raises OSError, and Unreadable where the archive has become shorter."""
        k, column = self._place(i)
        start, size = self.scans[k].members[:2, column].tolist()
        require_small(size)
        with open(self.files[k], "rb") as archive:
            archive.seek(start)
            data = archive.read(size)
        if len(data) < size:
            raise Unreadable("is cut off: its archive has become shorter")
        return data

    def texts(self, suffixes: Sequence[str]) -> "MemberTexts":
        """What the members of these endings say of each image. All archives are gone through anew.

        Raises UserError for a text of more than TEXT bytes.
        """
        found = MemberTexts()
        endings = (*suffixes, *(suffix.upper() for suffix in suffixes))
        with late("looking for captions in tar archives", len(self.files)) as tick:
            for k, (file, scan) in enumerate(zip(self.files, self.scans, strict=True), 1):
                signals.check()
                images = [scan.name(i) for i in range(len(scan))]
                texts = {info.name: content for info, content in _texts_of(file, endings)}
                found.add(file, images, texts, suffixes)
                tick(k, "")
        return found

    def _place(self, i: int) -> tuple[int, int]:
        """The archive of image i, and its column there."""
        k = bisect_right(self.ends, i)
        return k, i - (self.ends[k - 1] if k else 0)

    def _labels(self) -> Labels | None:
        """The classes; None where no image has one."""
        c = torch.cat([scan.members[2] for scan in self.scans])
        lacking = c == UNLABELLED
        wrong = next((scan.wrong for scan in self.scans if scan.wrong), None)
        if not wrong and bool(lacking.all()):
            return None
        if not wrong and bool(lacking.any()):
            k, column = self._place(first := int(lacking.nonzero()[0]))
            key = _key(self.scans[k].name(column))
            wrong = f"{self.path(first)} has no label '{key}.cls', others have: set data.labelled=false"
        if wrong:
            raise UserError(wrong)
        return counted(c, self.files[0])


@dataclass(frozen=True)
class MemberTexts:
    """The texts next to the images of archives. A member is named as an image is: the archive, and its name there."""

    by_image: list[dict[str, bytes]] = field(default_factory=list[dict[str, bytes]])  # by ending
    images_of_text: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # by member
    orphans: list[str] = field(default_factory=list[str])  # members of no image

    def add(self, file: str, images: Sequence[str], texts: Mapping[str, bytes], suffixes: Sequence[str]) -> None:
        """Add an archive: the names of its images, and its texts by name. Of other endings they are of no image."""
        texts_by_key: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
        images_by_key: defaultdict[str, list[str]] = defaultdict(list)
        for image in images:
            images_by_key[normal_form(_key(image))].append(f"{file} member {image}")
        for name, content in texts.items():
            key = normal_form(_key(name))
            ending = name.rpartition(".")[2]
            member = f"{file} member {name}"
            if ending in suffixes and key in images_by_key:
                texts_by_key[key][ending] = content
                self.images_of_text[member] = images_by_key[key]
            else:
                self.orphans.append(member)
        self.by_image.extend(texts_by_key.get(normal_form(_key(image)), {}) for image in images)


def look(file: str) -> Scan:
    """Where the images of an archive lie: as noted, else as found now, and noted. Raises as `scan`."""
    about = os.stat(file)
    state = f"{about.st_size} {about.st_mtime_ns}"
    folder, name = os.path.split(os.path.abspath(file))
    places = [place / f"{name}.safetensors" for place in files.places(Path(folder), NAME)]
    for place in places:
        if found := read(place, state):
            return found
    if (place := note.best(places)) is None:
        return scan(file)
    with note.held(place):
        if found := read(place, state):  # another process was quicker
            return found
        found = scan(file)
        try:
            write(place, found, state)
        except OSError as error:
            what = f"{place.parent} cannot be written ({error.strerror})"
            warnings.warn(f"{what}: the next start looks again", stacklevel=2)
        return read(place, state) or found  # what was read is mapped


def read(place: Path, state: str) -> Scan | None:
    """What was noted of an archive in this state; None where nothing was."""
    if noted := note.read(place):
        tensors, (was, wrong) = noted[0], json.loads(noted[1])
        return Scan(tensors["members"], tensors["names"], wrong) if was == state else None
    return None


def write(place: Path, found: Scan, state: str) -> None:
    """Note what was found. Raises OSError."""
    note.write(place, {"members": found.members, "names": found.names}, json.dumps([state, found.wrong]))


def scan(file: str) -> Scan:
    """Where the images of an archive lie. Raises UserError where it is damaged, OSError where it cannot be read."""
    found: list[tuple[int, int]] = []
    names: list[bytes] = []
    keys: list[str] = []
    classes: dict[str, int] = {}
    wrong = ""
    for info, content in _members(file, ("cls",), CLASS):
        if content is None:
            found.append((info.offset_data, info.size))
            names.append(info.name.encode(errors="replace"))
            keys.append(_key(info.name))
        else:
            try:
                classes[_key(info.name)] = int(np.int64(int(content)))
            except (ValueError, OverflowError):
                wrong = wrong or f"{file} member {info.name} holds no class number: {content[:20]!r}"
    start, size = zip(*found, strict=True) if found else ((), ())
    label = (classes.get(key, UNLABELLED) for key in keys)
    members = torch.tensor([start, size, [*label], [*accumulate(map(len, names))]], dtype=torch.int64)
    return Scan(members, torch.from_numpy(np.frombuffer(b"".join(names), np.uint8).copy()), wrong)


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


def _texts_of(file: str, endings: Sequence[str]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The members of an archive with these endings. Raises UserError for one of more than TEXT bytes."""
    for info, content in _members(file, endings, TEXT):
        if content is None:  # an image
            continue
        if info.size > TEXT:
            raise UserError(f"{file} member {info.name} has {info.size:,} bytes, and a text has at most {TEXT:,}")
        yield info, content


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
