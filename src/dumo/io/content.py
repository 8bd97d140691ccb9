"""What is in the items of a data set, known by SHA-256.

An item is hashed when it is read for the first time, and never again as long as the file that it lies in has the same
size, time of change and inode: these are noted with the hashes (`dumo.io.note`), so the next start costs a stat for
each file. A checkpoint or a cache keeps the hashes of the items that it was made of, and expects them again:

    the file is as noted                    the noted hash is compared at once
    its size or time changed                it is hashed at once
    its inode alone changed: a copy         it is hashed when it is read
    nobody noted it on this machine         it is hashed when it is read

An item whose content changed in place, with its time set back, is noticed by `verify` alone.
"""

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dumo.io import digest, note
from dumo.io import file as files
from dumo.runtime import signals
from dumo.runtime.progress import late
from dumo.types import UserError

NAME = ".dumo-content.safetensors"
BYTES = 32  # of a hash
SAME, CHANGED, COPIED, UNKNOWN = range(4)  # what the note says of a file
PIECE, WINDOW = 64, 4096  # items that a thread hashes in one go, and all between two looks at signals: ours
NOTED = 30.0  # seconds between two notes, or a hundred times what one takes: ours
FEW = 3  # items that a message names

State = tuple[int, int, int]  # of a file: its size, the time of its last change in ns, its inode
Hashed = NDArray[np.uint8]  # (n, 32), zeros where an item is not hashed yet


@dataclass(frozen=True)
class Files:
    """The files that items lie in, in the order of the items."""

    paths: Sequence[str]
    states: NDArray[np.int64]  # (k, 3)
    counts: NDArray[np.int64]  # (k,), items in each

    @classmethod
    def of(cls, paths: Sequence[str], states: Sequence[State], counts: Sequence[int] | None = None) -> "Files":
        """`counts`: one in each, if not given."""
        numbers = np.array(states, np.int64).reshape(-1, 3)
        return cls(paths, numbers, np.ones(len(paths), np.int64) if counts is None else np.array(counts, np.int64))

    @cached_property
    def above(self) -> str:
        """The deepest folder that holds them all."""
        parts = (path.rpartition(os.sep) for path in self.paths)  # several times as fast as dirname
        return os.path.commonpath({head or sign for head, sign, _ in parts})

    @cached_property
    def names(self) -> bytes:
        """Their names below that folder."""
        return joined(path[len(self.above) :] for path in self.paths)

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """The file of each item."""
        return np.repeat(np.arange(len(self.paths)), self.counts)


class Hashes:
    """The hashes of items: those that are known, and those that are expected."""

    def __init__(
        self, of: Files, path: Callable[[int], str], read: Callable[[int], bytes], classes: Tensor | None = None
    ) -> None:
        """Recall what is noted. `path` names an item, `read` gives its bytes, from many threads at once."""
        self.files, self.path, self.read, self.classes = of, path, read, classes
        n = int(of.counts.sum())
        self.known: Hashed = np.zeros((n, BYTES), np.uint8)
        self.expected: Hashed | None = None
        self.odd = set[int]()  # those that were read, and are others than expected
        self.why = ""  # what is to be said of an item that is another than expected
        self.news, self.noted, self.wait, self.noting = 0, time.monotonic(), NOTED, Lock()
        self.states = _recalled(of, self.known)
        self.pending = bytearray((~self.known.any(1)).astype(np.uint8).tobytes())

    def __len__(self) -> int:
        return len(self.known)

    def see(self, i: int, data: bytes) -> None:
        """Hash an item as it is read, if it is not known. Raises UserError, with its name, where another is expected.

        May be called from many threads.
        """
        if self.pending[i]:
            self._hash(i, data)
            if self.expected is not None and self.expected[i].any() and (self.expected[i] != self.known[i]).any():
                self.odd.add(i)
                self.save()
        if i in self.odd:
            raise UserError(f"{self.path(i)} {self.why}")

    def _hash(self, i: int, data: bytes) -> None:
        self.known[i] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        self.pending[i] = False
        self.news += 1

    def hash(self, items: Iterable[int] | NDArray[np.int64]) -> None:
        """Read and hash these items, if they are not known; one that cannot be read stays unknown."""
        todo = [int(i) for i in items if self.pending[i]]

        def some(first: int) -> None:
            for i in todo[first : first + PIECE]:
                try:
                    self._hash(i, self.read(i))
                except (OSError, ValueError):  # who decodes it says so
                    continue

        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="hash")
        try:
            with late("hashing images", len(todo)) as tick:
                for begin in range(0, len(todo), WINDOW):
                    signals.check()
                    list(pool.map(some, range(begin, min(begin + WINDOW, len(todo)), PIECE)))
                    tick(min(begin + WINDOW, len(todo)), "")
                    self.rest()
        finally:
            pool.shutdown(cancel_futures=True)
            self.save()

    def forget(self) -> None:
        """Trust no note: every item is to be read again."""
        self.known[:], self.pending = 0, bytearray(b"\1" * len(self))

    def expect(self, hashes: Hashed, why: str) -> None:
        """From now on an item is to be as here, where it is not zeros; `why` is said of one that is another."""
        self.expected, self.why, self.odd = hashes, why, set()

    def suspect(self, *, copies: bool = False) -> NDArray[np.int64]:
        """The items that are expected and not known, in files that changed since they were noted, or are copies."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        odd = (self.states == CHANGED) | (copies & (self.states == COPIED))
        if not odd.any():
            return np.zeros(0, np.int64)
        return np.flatnonzero(odd[self.files.owners] & self.expected.any(1) & ~self.known.any(1))

    def doubtful(self, items: range) -> bool:
        """Whether any of these items is known, or its file is not as it was noted."""
        here = slice(items.start, items.stop)
        odd = np.isin(self.states[self.files.owners[here]], (CHANGED, COPIED))
        return bool(odd.any() or self.known[here].any())

    def others(self) -> NDArray[np.int64]:
        """The items that are known to be others than expected."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        both = self.expected.any(1) & self.known.any(1)
        return np.flatnonzero(both & (self.expected != self.known).any(1))

    def seen(self) -> Hashed:
        """What was read so far, by this process or as is expected."""
        known = self._whole()
        if self.expected is None:
            return known
        return np.where(self.expected.any(1, keepdims=True), self.expected, known)

    def _whole(self) -> Hashed:
        """Those that are known, none half-written by a thread that reads."""
        pending = np.frombuffer(bytes(self.pending), bool)  # before them
        return np.where(pending[:, None], np.uint8(0), self.known)

    @cached_property
    def names(self) -> bytes:
        """What the items are called, below the folder that holds them all."""
        return joined(self.path(i)[len(self.files.above) :] for i in range(len(self)))

    @cached_property
    def packed(self) -> Tensor:
        """The names as a file keeps them."""
        return torch.from_numpy(np.frombuffer(zlib.compress(self.names, 1), np.uint8).copy())

    def labels(self) -> str:
        """A hash of the items' classes."""
        return digest.of_bytes(b"") if self.classes is None else digest.of_tensor(self.classes)

    def title(self) -> str:
        """A short text, another one where items were added, removed or renamed, or have other classes."""
        return digest.short(digest.of_bytes(self.names), self.labels())

    def digest(self, items: Sequence[int]) -> str:
        """A hash of the hashes of these items."""
        return digest.of_bytes(self.known[items].tobytes())

    def size(self, items: NDArray[np.int64]) -> int:
        """How many bytes the files have that these items lie in."""
        return int(self.files.states[np.unique(self.files.owners[items]), 0].sum())

    def rest(self) -> None:
        """Note what is new: where all is known, or it is long ago since the last time."""
        if self.news and (time.monotonic() > self.noted + self.wait or not any(self.pending)):
            self.save()

    def save(self) -> None:
        """Note what is new; where that is not allowed, do not."""
        with self.noting:
            if not self.news:
                return
            self.news, begun = 0, time.monotonic()
            folder = Path(self.files.above)
            place = note.best(files.places(folder, NAME))
            if place:
                try:
                    with note.held(place):
                        note.write(place, _merged(self.files, self._whole(), note.read(place)), "")
                except OSError:
                    pass
            self.noted = time.monotonic()
            self.wait = max(NOTED, 100 * (self.noted - begun))


def hashes_of(source: object) -> Hashes | None:
    """Those of a source of images; None for one whose samples are no files."""
    found = getattr(source, "hashes", None)
    return found if isinstance(found, Hashes) else None


def joined(names: Iterable[str]) -> bytes:
    """Names as bytes; no name holds NUL."""
    return "\0".join(names).encode("utf-8", "surrogateescape")


def split(names: bytes) -> list[str]:
    """The names again."""
    return names.decode("utf-8", "surrogateescape").split("\0")


def unpacked(data: bytes) -> bytes:
    """The names that were packed. Raises UserError where they are damaged."""
    try:
        return zlib.decompress(data)
    except zlib.error as error:
        raise UserError(f"names of images are damaged ({error})") from error


def moved(then: bytes, now: bytes) -> str:
    """Which names are gone and which are new, in words."""
    old, new = set(split(then)), set(split(now))
    gone, come = sorted(old - new), sorted(new - old)
    found = [f"{few(names, lambda name: name[1:])} {word}" for names, word in ((gone, "gone"), (come, "new")) if names]
    return ", ".join(found) or "they are in another order"


def few(items: Sequence[Any], name: Callable[[Any], str] = str) -> str:
    """The names of the first few of many, and how many more there are."""
    more = len(items) - FEW
    return ", ".join(map(name, items[:FEW])) + (f" and {more:,} more" if more > 0 else "")


def _aligned(of: Files, found: note.Note) -> tuple[NDArray[np.int64], Hashed]:
    """What a note says of these files: (k, 3) states, -1 where it does not know one, and (n, 32) hashes."""
    tensors, _ = found
    names, states, counts, hashes = (tensors[name].numpy() for name in ("names", "states", "counts", "hashes"))
    if names.tobytes() == of.names:
        place = np.arange(len(of.paths))
    else:
        number = {name: i for i, name in enumerate(split(names.tobytes()))}
        place = np.array([number.get(name, -1) for name in split(of.names)])
    there = np.where((place >= 0)[:, None], states[place], -1)
    whole = (place >= 0) & (counts[place] == of.counts)
    there[(place >= 0) & ~whole, 0] = -2  # of another number of items: it has changed
    shift = (np.cumsum(counts) - counts)[place] - (np.cumsum(of.counts) - of.counts)
    rows = np.arange(int(of.counts.sum())) + np.repeat(shift, of.counts)
    good = np.repeat(whole, of.counts)
    return there, np.where(good[:, None], hashes[np.where(good, rows, 0)], np.uint8(0))


def _recalled(of: Files, known: Hashed) -> NDArray[np.int64]:
    """Fill in the hashes of files that are as noted, by all notes there are; how each of the files is, (k,)."""
    found = np.full(len(of.paths), UNKNOWN)
    for place in files.places(Path(of.above), NAME):
        if noted := note.read(place):
            states, hashes = _aligned(of, noted)
            equal = states == of.states
            how = np.select([equal.all(1), equal[:, :2].all(1), states[:, 0] == -1], [SAME, COPIED, UNKNOWN], CHANGED)
            fresh = np.repeat(how == SAME, of.counts)
            if fresh.all() and not known.any():
                known[:] = hashes
            else:
                known[fresh] = np.maximum(known[fresh], hashes[fresh])
            found = np.minimum(found, how)
    return found


def _merged(of: Files, known: Hashed, theirs: note.Note | None) -> dict[str, Tensor]:
    """A note of what is known here and of what was noted: of other files, and of those that are not hashed here."""
    names, states, counts, hashes = of.names, of.states, of.counts, known
    if theirs:
        before, old = _aligned(of, theirs)
        equal, hashed = (before == of.states).all(1), np.zeros(len(of.paths), bool)
        hashed[of.owners[known.any(1)]] = True
        keep = ~equal & ~hashed & (before[:, 0] >= 0)
        states = np.where(keep[:, None], before, states)
        take = np.repeat(equal | keep, counts)[:, None] & ~known.any(1, keepdims=True)
        hashes = np.where(take, old, known)
        if rest := _strangers(of, theirs):
            names = b"\0".join((names, rest[0]))
            states, counts, hashes = (
                np.concatenate(pair) for pair in zip((states, counts, hashes), rest[1:], strict=True)
            )
    arrays = {"names": np.frombuffer(names, np.uint8), "states": states, "counts": counts, "hashes": hashes}
    return {name: torch.from_numpy(np.ascontiguousarray(array).copy()) for name, array in arrays.items()}


def _strangers(of: Files, theirs: note.Note) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64], Hashed] | None:
    """What a note says of files that are there and are not among these: another split of the data."""
    tensors, _ = theirs
    names, states, counts, hashes = (tensors[name].numpy() for name in ("names", "states", "counts", "hashes"))
    if names.tobytes() == of.names:
        return None
    own, listed = set(split(of.names)), split(names.tobytes())
    kept = [i for i, name in enumerate(listed) if name not in own and os.path.lexists(of.above + name)]
    if not kept:
        return None
    rows = np.isin(np.repeat(np.arange(len(listed)), counts), kept)
    return joined(listed[i] for i in kept), states[kept], counts[kept], hashes[rows]
