"""What is in files, by SHA-256: read once, and noted by the size, the time of change and the inode of each file.

A file may hold several items, as an archive of images does, and each has a hash. The hashes of the files of a folder
lie in a note next to them (`dumo.io.note`), to which every process adds what it has read. So the next start costs a
stat for each file, which is then

    SAME        as noted: so are its hashes
    COPIED      another inode, and nothing else
    CHANGED     of another size or time, or of another number of items
    UNKNOWN     noted by nobody on this machine

A content that changed in place, with its time set back, is not noticed.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dumo.io import file, note

NAME = ".dumo-content.safetensors"
BYTES = 32  # of a hash
SAME, CHANGED, COPIED, UNKNOWN = range(4)  # of several notes the first of these counts
SAVE_SECONDS = 30.0  # between two notes, or a hundred times what one takes: ours
NOT_NOTED, OTHER_COUNT = -1, -2  # in place of the size of a file: it is in no note, or had another number of items

State = tuple[int, int, int]  # of a file: its size, the time of its last change in ns, its inode
States = NDArray[np.int64]  # (k, 3)
Hashed = NDArray[np.uint8]  # (n, 32), zeros where an item is not hashed yet


def state_of(about: os.stat_result) -> State:
    """By what a file is known again."""
    return about.st_size, about.st_mtime_ns, about.st_ino


def states_of(paths: Iterable[str]) -> list[State]:
    """The same of some files. Raises OSError where one is not there."""
    return [state_of(os.stat(path)) for path in paths]


@dataclass(frozen=True)
class Files:
    """The files that items lie in, in the order of the items."""

    paths: Sequence[str]
    states: States
    counts: NDArray[np.int64]  # (k,), items in each

    @classmethod
    def of(cls, paths: Sequence[str], states: Sequence[State], counts: Sequence[int] | None = None) -> "Files":
        """`counts`: one in each, if not given."""
        if counts is None:
            counts = [1] * len(paths)
        return cls(paths, np.array(states, np.int64).reshape(-1, 3), np.array(counts, np.int64))

    @cached_property
    def above(self) -> str:
        """The deepest folder that holds them all."""
        parts = (path.rpartition(os.sep) for path in self.paths)  # several times as fast as dirname
        return os.path.commonpath({head or separator for head, separator, _ in parts})

    @cached_property
    def names(self) -> bytes:
        """Their names below that folder."""
        return joined(path[len(self.above) :] for path in self.paths)

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """The file of each item."""
        return np.repeat(np.arange(len(self.paths)), self.counts)


class SeenFiles:
    """The hashes of the items of some files: those that are noted, and those that are added as items are read."""

    def __init__(self, files: Files, *, trust_copies: bool = False) -> None:
        """Recall what is noted of files that are the same; `trust_copies`: of copies, too."""
        self.files = files
        self.known: Hashed = np.zeros((int(files.counts.sum()), BYTES), np.uint8)
        self.status = _recall(files, self.known, trust_copies=trust_copies)  # (k,)
        self.pending = bytearray((~self.known.any(1)).astype(np.uint8).tobytes())  # 1: the item is not hashed yet
        self._unsaved = 0
        self._saved_at = time.monotonic()
        self._save_seconds = SAVE_SECONDS
        self._saving = Lock()

    def __len__(self) -> int:
        """The number of items."""
        return len(self.known)

    def add(self, i: int, sha256: bytes) -> None:
        """An item was read. May be called from many threads."""
        self.known[i] = np.frombuffer(sha256, np.uint8)
        self.pending[i] = False
        self._unsaved += 1

    def forget(self) -> None:
        """Trust no note: every item is to be read again."""
        self.known[:] = 0
        self.pending = bytearray(b"\1" * len(self))

    def whole(self) -> Hashed:
        """Those that are known, none half-written by a thread that reads."""
        pending = np.frombuffer(bytes(self.pending), bool)  # before `known` is read
        return np.where(pending[:, None], np.uint8(0), self.known)

    def rest(self) -> None:
        """Note what is new where all is known, or it is long ago since the last time."""
        is_due = time.monotonic() > self._saved_at + self._save_seconds
        if self._unsaved and (is_due or not any(self.pending)):
            self.save()

    def save(self) -> None:
        """Note what is new; where that is not allowed, do not."""
        with self._saving:
            if not self._unsaved:
                return
            self._unsaved = 0
            began = time.monotonic()
            place = note.best(file.note_places(Path(self.files.above), NAME))
            if place is not None:
                try:
                    with note.held(place):
                        note.write(place, _merged(self.files, self.whole(), note.read(place)), "")
                except OSError:
                    pass
            self._saved_at = time.monotonic()
            self._save_seconds = max(SAVE_SECONDS, 100 * (self._saved_at - began))


def joined(names: Iterable[str]) -> bytes:
    """Names as bytes; no name holds NUL."""
    return "\0".join(names).encode("utf-8", "surrogateescape")


def split(names: bytes) -> list[str]:
    """The names again."""
    return names.decode("utf-8", "surrogateescape").split("\0")


def _recall(files: Files, known: Hashed, *, trust_copies: bool) -> NDArray[np.int64]:
    """Fill in the noted hashes, by all notes there are; how each of the files is, (k,)."""
    status = np.full(len(files.paths), UNKNOWN)
    for place in file.note_places(Path(files.above), NAME):
        noted = note.read(place)
        if noted is None:
            continue
        states, hashes = _aligned(files, noted)
        equal = states == files.states
        is_same = equal.all(1)
        is_copied = equal[:, :2].all(1)
        is_unknown = states[:, 0] == NOT_NOTED
        status_here = np.select([is_same, is_copied, is_unknown], [SAME, COPIED, UNKNOWN], CHANGED)
        holds = is_same | is_copied if trust_copies else is_same
        takes = np.repeat(holds, files.counts)
        if takes.all() and not known.any():
            known[:] = hashes
        else:
            takes &= ~known.any(1)
            known[takes] = hashes[takes]
        status = np.minimum(status, status_here)
    return status


def _aligned(files: Files, noted: note.Note) -> tuple[States, Hashed]:
    """What a note says of these files: (k, 3) states, and the (n, 32) hashes of their items.

    The size is NOT_NOTED of a file that is not in it, and OTHER_COUNT of one that had another number of items.
    """
    tensors, _ = noted
    noted_names = tensors["names"].numpy().tobytes()
    noted_states = tensors["states"].numpy()
    noted_counts = tensors["counts"].numpy()
    noted_hashes = tensors["hashes"].numpy()
    if noted_names == files.names:
        places = np.arange(len(files.paths))
    else:
        place_of = {name: i for i, name in enumerate(split(noted_names))}
        places = np.array([place_of.get(name, -1) for name in split(files.names)])
    is_noted = places >= 0
    has_all_items = is_noted & (noted_counts[places] == files.counts)
    states = np.where(is_noted[:, None], noted_states[places], NOT_NOTED)
    states[is_noted & ~has_all_items, 0] = OTHER_COUNT
    # the rows of a file's items here and in the note
    first = np.cumsum(files.counts) - files.counts
    noted_first = np.cumsum(noted_counts) - noted_counts
    shifts = np.repeat(noted_first[places] - first, files.counts)
    is_known = np.repeat(has_all_items, files.counts)
    rows = np.where(is_known, np.arange(len(is_known)) + shifts, 0)
    return states, np.where(is_known[:, None], noted_hashes[rows], np.uint8(0))


def _merged(files: Files, known: Hashed, noted: note.Note | None) -> dict[str, Tensor]:
    """A note of what is known here and of what was noted: of other files, and of those that are not hashed here."""
    names = files.names
    states = files.states
    counts = files.counts
    hashes = known
    if noted is not None:
        noted_states, noted_hashes = _aligned(files, noted)
        is_same = (noted_states == files.states).all(1)
        is_hashed = np.zeros(len(files.paths), bool)
        is_hashed[files.owners[known.any(1)]] = True
        # what a file was stays noted until it is hashed as it is
        keeps_noted = ~is_same & ~is_hashed & (noted_states[:, 0] >= 0)
        states = np.where(keeps_noted[:, None], noted_states, states)
        takes_noted = np.repeat(is_same | keeps_noted, counts)[:, None] & ~known.any(1, keepdims=True)
        hashes = np.where(takes_noted, noted_hashes, known)
        others = _others(files, noted)
        if others is not None:
            other_names, other_states, other_counts, other_hashes = others
            names = b"\0".join((names, other_names))
            states = np.concatenate((states, other_states))
            counts = np.concatenate((counts, other_counts))
            hashes = np.concatenate((hashes, other_hashes))
    arrays = {"names": np.frombuffer(names, np.uint8), "states": states, "counts": counts, "hashes": hashes}
    return {name: torch.from_numpy(np.ascontiguousarray(array).copy()) for name, array in arrays.items()}


def _others(files: Files, noted: note.Note) -> tuple[bytes, States, NDArray[np.int64], Hashed] | None:
    """Names, states, counts and hashes of noted files that are there and are not among these: of another split."""
    tensors, _ = noted
    noted_names = tensors["names"].numpy().tobytes()
    if noted_names == files.names:
        return None
    own = set(split(files.names))
    listed = split(noted_names)
    kept = [i for i, name in enumerate(listed) if name not in own and os.path.lexists(files.above + name)]
    if not kept:
        return None
    counts = tensors["counts"].numpy()
    rows = np.isin(np.repeat(np.arange(len(listed)), counts), kept)
    names = joined(listed[i] for i in kept)
    return names, tensors["states"].numpy()[kept], counts[kept], tensors["hashes"].numpy()[rows]
