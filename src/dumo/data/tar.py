"""Webdataset shards: tar archives in which `0001.jpg` and `0001.cls` are one sample, an image and its class number.

`Tar` is the store of the images in some archives. The order of events:

1. Opening a `Tar` scans each archive: a `Scan` says where its images lie and of which classes they are (`_noted_scan`).
   Finding the members takes a read for each, hours for a hundred million, so each archive is scanned once
   (`scan_archive`) and the scan is noted.
2. `Tar.read` reads an image at its place.
3. `Tar.texts` goes through all archives again, for the captions next to the images (`MemberTexts`).

A scan is noted in `.dumo-index/<archive>.safetensors` next to the archive, from where it is mapped into memory. An
archive of another size or time than noted is scanned again. Where its folder may not be written to, the note lies in
the user's cache folder (`dumo.io.note.places_for`); where that may not either, the scan is kept in memory.

An archive that was cut short, or has a hole of zeros, looks whole to a reader that stops at the first thing that is no
header. So it must end as tar ends it (`_require_whole_end`): with a block of zeros where the members end, and nothing
but zeros after it, no more than fill its last record.
"""

import json
import os
import tarfile
import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dumo.data.pairing import normal_form
from dumo.data.pixel import Unreadable
from dumo.data.store import Labels, count_classes, require_small
from dumo.io import digest, note
from dumo.io.inventory import ItemFiles, states_of
from dumo.io.suffix import IMAGE_SUFFIXES
from dumo.runtime import signals
from dumo.runtime.progress import bar
from dumo.types import UserError

# Sizes of tar's records, in bytes: 20 blocks by default, else, on request, a power of two of them, up to a MiB.
_RECORD_SIZES = (tarfile.RECORDSIZE, *(tarfile.BLOCKSIZE << k for k in range(12)))
_MAX_CLASS_BYTES = 100  # that are read of a class number: ours
_MAX_TEXT_BYTES = 2**20  # of a text that goes with an image: ours
_CHUNK_BYTES = 2**20  # that are read at a time after an archive's end: ours
_FETCH_AGAIN = "fetch it again, or remove it"  # the end of messages
NOTE_FOLDER = ".dumo-index"
_MAX_MAPPED = 2**14  # notes that are mapped, while the rest is read; Linux allows 65,530 maps. Ours
_UNLABELLED = -(2**63)  # in place of a class, where an image has none


@dataclass(frozen=True)
class Scan:
    """Where the n images of an archive lie."""

    # A column for each image: its first byte, its size in bytes, its class, and the end of its name in `names`.
    members: Int64[Tensor, "4 n"]
    names: UInt8[Tensor, " m"]  # of all images, one after the other
    problem: str = ""  # with the labels, for a message; "": there is none
    num_left_out: int = 0  # members that end like images after several dots
    left_out: str = ""  # the name of the first of these

    def __len__(self) -> int:
        return self.members.shape[1]

    @property
    def classes(self) -> Int64[Tensor, " n"]:
        """The class of each image, _UNLABELLED where it has none."""
        return self.members[2]

    def span(self, i: int) -> tuple[int, int]:
        """The first byte of image i, and its size in bytes."""
        start, size = self.members[:2, i].tolist()
        return start, size

    def name(self, i: int) -> str:
        """The name of image i in the archive."""
        begin = int(self.members[3, i - 1]) if i else 0
        end = int(self.members[3, i])
        return self.names[begin:end].numpy().tobytes().decode(errors="replace")

    def copy(self) -> "Scan":
        """A copy in memory, not mapped."""
        return replace(self, members=self.members.clone(), names=self.names.clone())


class Tar:
    """The images of some archives, in their order there, to be read at random.

    Raises UserError for a file that is no whole archive, and where only some images have a label.
    """

    def __init__(self, archives: Sequence[str], *, labelled: bool) -> None:
        self.files = archives
        self.scans: list[Scan] = []
        with bar("looking through tar archives", len(archives)) as tick:
            for k, file in enumerate(archives):
                signals.check()
                mapped = _noted_scan(file)
                self.scans.append(mapped if k < _MAX_MAPPED else mapped.copy())
                tick(k + 1, "")
        self._warn_of_left_out()
        num_images = [len(scan) for scan in self.scans]
        self.image_ends = list(accumulate(num_images))  # by archive: the number of the first image after it
        self.item_files = ItemFiles.of(archives, states_of(archives), num_images)
        self.labels = self._labels() if labelled else None

    def __len__(self) -> int:
        return self.image_ends[-1]

    def fingerprint(self) -> str:
        """A digest of the archives' names and sizes, and of the names, places and classes in them."""
        folder = os.path.commonpath([os.path.dirname(file) for file in self.files])
        sizes = (f"{os.path.relpath(file, folder)} {os.path.getsize(file)}" for file in self.files)
        scans = (digest.of_bytes(scan.members.numpy().tobytes(), scan.names.numpy().data) for scan in self.scans)
        return digest.short(*sizes, *scans)

    def path(self, i: int) -> str:
        """The archive and the member of image i."""
        k, image = self._locate(i)
        return f"{self.files[k]} member {self.scans[k].name(image)}"

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError, and Unreadable where the archive has become shorter."""
        k, image = self._locate(i)
        start, size = self.scans[k].span(image)
        require_small(size)
        with open(self.files[k], "rb") as archive:
            archive.seek(start)
            data = archive.read(size)
        if len(data) < size:
            raise Unreadable("is cut off: its archive has become shorter")
        return data

    def texts(self, suffixes: Sequence[str]) -> "MemberTexts":
        """The texts next to each image: members with an ending in `suffixes`, such as `txt`.

        All archives are read again. Raises UserError for a text of more than _MAX_TEXT_BYTES bytes.
        """
        member_texts = MemberTexts()
        endings = (*suffixes, *(suffix.upper() for suffix in suffixes))  # `TXT` is reported as an orphan
        with bar("looking for captions in tar archives", len(self.files)) as tick:
            for k, (file, scan) in enumerate(zip(self.files, self.scans, strict=True), 1):
                signals.check()
                images = [scan.name(i) for i in range(len(scan))]
                texts = {info.name: content for info, content in _iterate_texts(file, endings)}
                member_texts.add(file, images, texts, suffixes)
                tick(k, "")
        return member_texts

    def _locate(self, i: int) -> tuple[int, int]:
        """The number of the archive that has image i, and the number of the image there."""
        k = bisect_right(self.image_ends, i)
        return k, i - (self.image_ends[k - 1] if k else 0)

    def _warn_of_left_out(self) -> None:
        """Warn of members that end like images and are none, in one line."""
        num_left_out = sum(scan.num_left_out for scan in self.scans)
        if not num_left_out:
            return
        first = next(scan.left_out for scan in self.scans if scan.num_left_out)
        warnings.warn(
            f"{num_left_out:,} members of tar archives are left out, such as {first}: in webdataset the ending of a "
            "name begins at its first dot, and these are no endings of images; rename them to have one dot",
            stacklevel=3,
        )

    def _labels(self) -> Labels | None:
        """The classes; None where no image has one. Raises UserError where only some have one, or it is no number."""
        for scan in self.scans:
            if scan.problem:
                raise UserError(scan.problem)
        c = torch.cat([scan.classes for scan in self.scans])
        unlabelled = c == _UNLABELLED
        if unlabelled.all():
            return None
        if unlabelled.any():
            first = int(unlabelled.nonzero()[0])
            k, image = self._locate(first)
            key = _sample_key(self.scans[k].name(image))
            raise UserError(f"{self.path(first)} has no label '{key}.cls', others have: set data.labelled=false")
        return count_classes(c, self.files[0])


@dataclass(frozen=True)
class MemberTexts:
    """The texts next to the images of archives. Members are named `ARCHIVE member NAME`."""

    by_image: list[dict[str, bytes]] = field(default_factory=list[dict[str, bytes]])  # of each image, by ending
    images_of_text: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # by the text's member
    orphans: list[str] = field(default_factory=list[str])  # texts that belong to no image

    def add(self, file: str, images: Sequence[str], texts: Mapping[str, bytes], suffixes: Sequence[str]) -> None:
        """Add an archive, given the names of its images, and its texts by name.

        A text belongs to the images of its sample key. One whose ending is not among `suffixes`, such as `TXT`, belongs
        to no image.
        """
        texts_by_key: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
        images_by_key: defaultdict[str, list[str]] = defaultdict(list)
        for image in images:
            images_by_key[normal_form(_sample_key(image))].append(f"{file} member {image}")
        for name, content in texts.items():
            key = normal_form(_sample_key(name))
            ending = name.rpartition(".")[2]
            member = f"{file} member {name}"
            if ending in suffixes and key in images_by_key:
                texts_by_key[key][ending] = content
                self.images_of_text[member] = images_by_key[key]
            else:
                self.orphans.append(member)
        self.by_image.extend(texts_by_key.get(normal_form(_sample_key(image)), {}) for image in images)


def _noted_scan(file: str) -> Scan:
    """The scan of an archive: from its note, else made now and noted. Raises UserError where it is damaged."""
    file_stat = os.stat(file)
    state = f"{file_stat.st_size} {file_stat.st_mtime_ns}"
    folder, name = os.path.split(os.path.abspath(file))
    places = [place / f"{name}.safetensors" for place in note.places_for(Path(folder), NOTE_FOLDER)]
    for place in places:
        noted = _read_note(place, state)
        if noted is not None:
            return noted
    place = note.best_place(places)
    if place is None:
        return scan_archive(file)
    with note.locked(place):
        noted = _read_note(place, state)
        if noted is not None:  # another process was quicker
            return noted
        scanned = scan_archive(file)
        try:
            _write_note(place, scanned, state)
        except OSError as error:
            warnings.warn(
                f"{place.parent} cannot be written ({error.strerror}): the next start looks again", stacklevel=2
            )
        noted = _read_note(place, state)  # which maps it, so that the scan made now can be freed
        return scanned if noted is None else noted


def _read_note(place: Path, state: str) -> Scan | None:
    """The scan that was noted of an archive in a state; None where there is no such note."""
    noted = note.read(place)
    if noted is None:
        return None
    tensors, text = noted
    noted_state, *facts = json.loads(text)
    if noted_state != state or len(facts) != 3:  # an earlier dumo noted one fact
        return None
    return Scan(tensors["members"], tensors["names"], *facts)


def _write_note(place: Path, scan: Scan, state: str) -> None:
    """Note the scan of an archive in a state. Raises OSError."""
    facts = [state, scan.problem, scan.num_left_out, scan.left_out]
    note.write(place, {"members": scan.members, "names": scan.names}, json.dumps(facts))


def scan_archive(file: str) -> Scan:
    """Go through the members of an archive. Raises UserError where it is damaged, OSError where it cannot be read."""
    starts: list[int] = []  # bytes
    sizes: list[int] = []  # bytes
    names: list[bytes] = []
    keys: list[str] = []
    class_of_key: dict[str, int] = {}
    problem = ""
    keys_and_names: list[tuple[str, str]] = []  # of members that end like images, and are none
    for info, content in _iterate_members(file, ("cls",), _MAX_CLASS_BYTES):
        if content is None and f".{_ending(info.name).lower()}" not in IMAGE_SUFFIXES:
            keys_and_names.append((_sample_key(info.name), info.name))
            continue
        if content is None:  # an image
            starts.append(info.offset_data)
            sizes.append(info.size)
            names.append(info.name.encode(errors="replace"))
            keys.append(_sample_key(info.name))
            continue
        try:
            class_of_key[_sample_key(info.name)] = int(np.int64(int(content)))
        except (ValueError, OverflowError):
            if not problem:
                problem = f"{file} member {info.name} holds no class number: {content[:20]!r}"
    classes = [class_of_key.get(key, _UNLABELLED) for key in keys]
    keys_with_image = set(keys)
    # a mask that goes with its image is not missed
    left_out = [name for key, name in keys_and_names if key not in keys_with_image]
    name_ends = list(accumulate(map(len, names)))
    members = torch.tensor([starts, sizes, classes, name_ends], dtype=torch.int64)
    packed_names = torch.from_numpy(np.frombuffer(b"".join(names), np.uint8).copy())
    return Scan(members, packed_names, problem, len(left_out), left_out[0] if left_out else "")


def _iterate_members(
    file: str, suffixes: Sequence[str], max_bytes: int
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Yield members that end like images with None, and members with an ending in `suffixes` with their content.

    A member ends like an image by its last dot; it is one if no dot stands before (`_ending`).
    At most `max_bytes` of a content are read. Raises UserError where the archive does not end as tar ends it.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            while info := archive.next():
                # else tarfile keeps all members, a kilobyte each; the attribute is not typed
                setattr(archive, "members", [])  # noqa: B010
                if info.size < 0 or info.issparse():
                    raise UserError(f"{file} is damaged, or sparse, at byte {info.offset}: {_FETCH_AGAIN}")
                path = PurePosixPath(info.name)
                suffix = _ending(info.name)
                if not info.isfile() or path.name.startswith("."):
                    continue
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    yield info, None
                elif suffix in suffixes:
                    content = archive.extractfile(info)
                    if content is not None:
                        yield info, content.read(max_bytes)
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{file} is no whole tar archive: {error}; {_FETCH_AGAIN}") from error
    _require_whole_end(file, end)


def _iterate_texts(file: str, endings: Sequence[str]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The members of an archive with these endings. Raises UserError for one of more than _MAX_TEXT_BYTES bytes."""
    for info, content in _iterate_members(file, endings, _MAX_TEXT_BYTES):
        if content is None:  # like an image
            continue
        if info.size > _MAX_TEXT_BYTES:
            raise UserError(
                f"{file} member {info.name} has {info.size:,} bytes, and a text has at most {_MAX_TEXT_BYTES:,}"
            )
        yield info, content


def _require_whole_end(file: str, end: int) -> None:
    """Raise UserError unless zeros follow the members, from byte `end`: one block or more, and at most a record."""
    size = os.stat(file).st_size
    with Path(file).open("rb") as archive:
        archive.seek(end)
        first_block = archive.read(tarfile.BLOCKSIZE)
        if len(first_block) < tarfile.BLOCKSIZE or any(first_block):  # where tarfile stops without a word
            raise UserError(f"{file} is broken off or damaged at byte {end}: {_FETCH_AGAIN}")
        while chunk := archive.read(_CHUNK_BYTES):
            if any(chunk):
                raise UserError(
                    f"{file} goes on after its end at byte {end}: it is damaged ({_FETCH_AGAIN}), or is several that "
                    "were laid end to end: write those as one"
                )
    num_zeros = size - end
    for record_size in _RECORD_SIZES:
        if size % record_size == 0 and num_zeros <= record_size + 2 * tarfile.BLOCKSIZE:
            return
    raise UserError(
        f"{file} holds {num_zeros} zeros from byte {end} on, more than tar writes at its end: a part of it is missing; "
        f"{_FETCH_AGAIN}"
    )


def _ending(name: str) -> str:
    """What follows the first dot in a member's name, as webdataset has it: "png", and "seg.png" of another part."""
    return PurePosixPath(name).name.partition(".")[2]


def _sample_key(name: str) -> str:
    """A member's path without all its endings, which an image, its label and its texts have in common (webdataset)."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0]))
