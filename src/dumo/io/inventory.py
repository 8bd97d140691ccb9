"""The SHA-256 of items in files: read once, and noted with the size, the time of change and the inode of each file.

An item is what is hashed: a file with one image, an image in an archive. `Inventory` holds the hashes of the items of
some files:

1. When it is made, it looks up the notes there are (`dumo.io.note`). That costs a stat for each file, which is then

       SAME        as noted: so are its hashes
       CHANGED     of another size or time, or of another number of items
       COPIED      of another inode, and nothing else
       UNKNOWN     noted by nobody on this machine

2. `add` takes the hash of an item that was read.
3. `save_if_due` and `save` add the new hashes to the note, which other processes may write, too. A file that changed
   stays noted as it was until all its items are hashed: else those that are not would pass for unchanged.

`state_of` and `states_of` tell by what a file is known again; `ItemFiles` says which items lie in which files;
`join_names` and `split_names` pack names.

A note is a safetensors file of four tensors: `names` (bytes, NUL between), `states` (k, 3), `counts` (k,) and `hashes`
(n, 32). Files of other splits of the same folder share it, so it may list more files, in another order.

A content that changed in place, with its time set back, is not noticed.
"""

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dumo.io import note

NOTE_NAME = ".dumo-content.safetensors"
HASH_BYTES = 32  # of a SHA-256
_SAVE_SECONDS = 30.0  # between two saves, at least: ours
_SAVE_COST_FACTOR = 100  # times what a save takes: the least time between two. Ours

# The status of a file, in the order in which it counts where notes in several places differ.
SAME, CHANGED, COPIED, UNKNOWN = range(4)

# By which a file is known again: its size in bytes, the time of its last change in ns, its inode.
FileState = tuple[int, int, int]
FileStates = NDArray[np.int64]  # (k, 3), a row for each file
HashRows = NDArray[np.uint8]  # (n, 32), a SHA-256 for each item; zeros where it is not known


def state_of(about: os.stat_result) -> FileState:
    """The state of a file."""
    return about.st_size, about.st_mtime_ns, about.st_ino


def states_of(paths: Iterable[str]) -> list[FileState]:
    """The states of some files. Raises OSError where a file does not exist."""
    return [state_of(os.stat(path)) for path in paths]


@dataclass(frozen=True)
class ItemFiles:
    """The files that items lie in, in the order of the items."""

    paths: Sequence[str]
    states: FileStates
    counts: NDArray[np.int64]  # (k,), items in each
    num_left_out: int = 0  # items of the last file that come after these, and are not among them

    @classmethod
    def of(cls, paths: Sequence[str], states: Sequence[FileState], counts: Sequence[int] | None = None) -> "ItemFiles":
        """Files with their states. `counts`: the number of items in each; None: one."""
        if counts is None:
            counts = [1] * len(paths)
        return cls(paths, np.array(states, np.int64).reshape(-1, 3), np.array(counts, np.int64))

    @cached_property
    def folder(self) -> str:
        """The deepest folder that holds all files."""
        parts = (path.rpartition(os.sep) for path in self.paths)  # several times as fast as dirname
        return os.path.commonpath({head or separator for head, separator, _ in parts})

    @cached_property
    def names(self) -> bytes:
        """The files' paths below `folder`, as `join_names` has them."""
        return join_names(path[len(self.folder) :] for path in self.paths)

    @cached_property
    def file_of_item(self) -> NDArray[np.int64]:
        """The number of each item's file, (n,)."""
        return np.repeat(np.arange(len(self.paths)), self.counts)

    @cached_property
    def whole(self) -> "ItemFiles":
        """The same files with all their items."""
        if not self.num_left_out:
            return self
        counts = self.counts.copy()
        counts[-1] += self.num_left_out
        return ItemFiles(self.paths, self.states, counts)


class Inventory:
    """The hashes of the items of some files: those that were noted, and those that are added as items are read."""

    def __init__(self, files: ItemFiles, *, trust_copies: bool = False) -> None:
        """Look up the notes on files that are the SAME; `trust_copies`: also on those that are COPIED."""
        self.files = files
        noted_hashes: HashRows = np.zeros((int(files.whole.counts.sum()), HASH_BYTES), np.uint8)
        self.status = _look_up(files.whole, noted_hashes, trust_copies=trust_copies)  # (k,)
        self.sha256: HashRows = noted_hashes[: int(files.counts.sum())]
        self.pending = bytearray((~self.sha256.any(1)).astype(np.uint8).tobytes())  # 1: the item is not hashed yet
        self._num_unsaved = 0
        self._saved_at = time.monotonic()
        self._save_interval = _SAVE_SECONDS
        self._save_lock = Lock()

    def __len__(self) -> int:
        """The number of items."""
        return len(self.sha256)

    def add(self, i: int, sha256: bytes) -> None:
        """Add the hash of item i, which was read. May be called from many threads."""
        self.sha256[i] = np.frombuffer(sha256, np.uint8)
        self.pending[i] = False
        self._num_unsaved += 1

    def forget(self) -> None:
        """Forget all hashes: every item is to be read again."""
        self.sha256[:] = 0
        self.pending = bytearray(b"\1" * len(self))

    def known_hashes(self) -> HashRows:
        """A copy of all hashes, (n, 32), zeros for items that are not hashed yet.

        No row of it is half-written by another thread.
        """
        pending = np.frombuffer(bytes(self.pending), bool)  # copied before the hashes: `add` writes it after them
        return np.where(pending[:, None], np.uint8(0), self.sha256)

    def save_if_due(self) -> None:
        """Save new hashes if all items are hashed, or the last save is long ago."""
        is_due = time.monotonic() > self._saved_at + self._save_interval
        if self._num_unsaved and (is_due or not any(self.pending)):
            self.save()

    def save(self) -> None:
        """Add new hashes to the note; does nothing where no note may be written."""
        with self._save_lock:
            if not self._num_unsaved:
                return
            self._num_unsaved = 0
            began = time.monotonic()
            place = note.best_place(note.places_for(Path(self.files.folder), NOTE_NAME))
            if place is not None:
                with suppress(OSError), note.locked(place):
                    hashes_of_all = np.pad(self.known_hashes(), ((0, self.files.num_left_out), (0, 0)))
                    merged = _merge(self.files.whole, hashes_of_all, note.read(place))
                    note.write(place, merged, "")
            self._saved_at = time.monotonic()
            self._save_interval = max(_SAVE_SECONDS, _SAVE_COST_FACTOR * (self._saved_at - began))


def join_names(names: Iterable[str]) -> bytes:
    """Names as bytes, with NUL between them, which no name holds."""
    return "\0".join(names).encode("utf-8", "surrogateescape")


def split_names(names: bytes) -> list[str]:
    """The names that `join_names` joined."""
    return names.decode("utf-8", "surrogateescape").split("\0")


def _look_up(files: ItemFiles, sha256: HashRows, *, trust_copies: bool) -> NDArray[np.int64]:
    """Fill in the hashes of items in files that are as noted, in any place, in `sha256` (n, 32).

    Returns the status of each file, (k,): SAME ... UNKNOWN. `trust_copies`: fill them in for copies, too.
    """
    status = np.full(len(files.paths), UNKNOWN)
    for place in note.places_for(Path(files.folder), NOTE_NAME):
        noted = note.read(place)
        if noted is None:
            continue
        aligned = _align(files, noted)
        is_equal = aligned.states == files.states
        is_same = aligned.has_all_items & is_equal.all(1)
        is_copied = aligned.has_all_items & is_equal[:, :2].all(1)  # in size and time
        status_in_note = np.select([is_same, is_copied, ~aligned.is_listed], [SAME, COPIED, UNKNOWN], CHANGED)
        status = np.minimum(status, status_in_note)

        # the hashes of items that no earlier note had
        is_trusted = is_same | is_copied if trust_copies else is_same
        is_taken = np.repeat(is_trusted, files.counts)  # by item
        if is_taken.all() and not sha256.any():  # mostly so, and faster
            sha256[:] = aligned.hashes
        else:
            is_taken &= ~sha256.any(1)
            sha256[is_taken] = aligned.hashes[is_taken]
    return status


class _AlignedNote(NamedTuple):
    """What a note says of some files, in their order."""

    is_listed: NDArray[np.bool_]  # (k,), whether it lists the file
    has_all_items: NDArray[np.bool_]  # (k,), whether it lists the file with as many items as it has now
    states: FileStates  # (k, 3); of a file that is not listed, any
    hashes: HashRows  # (n, 32), zeros for the items of files without all items


def _align(files: ItemFiles, noted: note.Note) -> _AlignedNote:
    """What a note says of these files."""
    tensors, _ = noted
    noted_names = tensors["names"].numpy().tobytes()
    noted_states = tensors["states"].numpy()
    noted_counts = tensors["counts"].numpy()
    noted_hashes = tensors["hashes"].numpy()

    # files: the place of each in the note, -1 where it is not there
    if noted_names == files.names:
        place_in_note = np.arange(len(files.paths))
    else:
        place_of_name = {name: i for i, name in enumerate(split_names(noted_names))}
        place_in_note = np.array([place_of_name.get(name, -1) for name in split_names(files.names)])
    is_listed = place_in_note >= 0
    has_all_items = is_listed & (noted_counts[place_in_note] == files.counts)

    # items: those of a file are neighbours here and in the note, so their numbers there are those here plus a shift
    first_item = np.cumsum(files.counts) - files.counts
    first_noted_item = np.cumsum(noted_counts) - noted_counts
    shifts = np.repeat(first_noted_item[place_in_note] - first_item, files.counts)
    is_known = np.repeat(has_all_items, files.counts)
    noted_items = np.where(is_known, np.arange(len(is_known)) + shifts, 0)
    hashes = np.where(is_known[:, None], noted_hashes[noted_items], np.uint8(0))
    return _AlignedNote(is_listed, has_all_items, noted_states[place_in_note], hashes)


def _merge(files: ItemFiles, known: HashRows, noted: note.Note | None) -> dict[str, Tensor]:
    """The tensors of a new note: what is known here, (n, 32), and what an older note has that is not known here."""
    names = files.names
    states = files.states
    counts = files.counts
    hashes = known
    if noted is not None:
        aligned = _align(files, noted)
        is_same = aligned.has_all_items & (aligned.states == files.states).all(1)
        is_known = known.any(1)  # by item
        is_hashed = np.ones(len(files.paths), bool)  # by file: whether all of its items are
        is_hashed[files.file_of_item[~is_known]] = False

        # keep the old entry of a changed file until its new content is hashed
        keeps_noted = ~is_same & ~is_hashed & aligned.has_all_items
        states = np.where(keeps_noted[:, None], aligned.states, states)
        takes_noted = (np.repeat(keeps_noted, counts) | (np.repeat(is_same, counts) & ~is_known))[:, None]
        hashes = np.where(takes_noted, aligned.hashes, known)

        other_files = _other_files(files, noted)
        if other_files is not None:
            names = b"\0".join((names, other_files.names))
            states = np.concatenate((states, other_files.states))
            counts = np.concatenate((counts, other_files.counts))
            hashes = np.concatenate((hashes, other_files.hashes))
    arrays = {"names": np.frombuffer(names, np.uint8), "states": states, "counts": counts, "hashes": hashes}
    return {name: torch.from_numpy(np.ascontiguousarray(array).copy()) for name, array in arrays.items()}


class _NotedFiles(NamedTuple):
    """Some files of a note."""

    names: bytes  # as `join_names` has them
    states: FileStates
    counts: NDArray[np.int64]
    hashes: HashRows


def _other_files(files: ItemFiles, noted: note.Note) -> _NotedFiles | None:
    """The noted files that exist and are not among `files`, since they are of another split; None: there are none."""
    tensors, _ = noted
    noted_names = tensors["names"].numpy().tobytes()
    if noted_names == files.names:
        return None
    names_here = set(split_names(files.names))
    listed_names = split_names(noted_names)
    other_places: list[int] = []  # in the note
    for i, name in enumerate(listed_names):
        if name not in names_here and os.path.lexists(files.folder + name):
            other_places.append(i)
    if not other_places:
        return None
    counts = tensors["counts"].numpy()
    file_of_item = np.repeat(np.arange(len(listed_names)), counts)
    is_of_other = np.isin(file_of_item, other_places)
    return _NotedFiles(
        names=join_names(listed_names[i] for i in other_places),
        states=tensors["states"].numpy()[other_places],
        counts=counts[other_places],
        hashes=tensors["hashes"].numpy()[is_of_other],
    )
