"""What is in the items of a data set, by SHA-256 (`dumo.io.seen`), and what they are expected to hold.

An item is hashed when it is read for the first time, and never again as long as its file is as it was noted. A
checkpoint or a cache keeps the hashes of the items that it was made of, and expects them again:

    the file is as noted                    the noted hash is compared at once
    its size or time changed                it is hashed at once
    its inode alone changed: a copy         it is hashed when it is read
    nobody noted it on this machine         it is hashed when it is read

An item whose content changed in place, with its time set back, is noticed by `verify` alone.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dumo.io import digest
from dumo.io.seen import CHANGED, COPIED, Files, Hashed, SeenFiles, joined, split
from dumo.runtime import signals
from dumo.runtime.progress import late
from dumo.types import UserError

PIECE, WINDOW = 64, 4096  # items that a thread hashes in one go, and all between two looks at signals: ours
FEW = 3  # items that a message names


class Hashes(SeenFiles):
    """The hashes of the items of a data set: those that are known, and those that are expected."""

    def __init__(
        self, files: Files, path: Callable[[int], str], read: Callable[[int], bytes], classes: Tensor | None = None
    ) -> None:
        """Recall what is noted. `path` names an item, `read` gives its bytes, from many threads at once."""
        super().__init__(files)
        self.path = path
        self.read = read
        self.classes = classes
        self.expected: Hashed | None = None
        self.odd = set[int]()  # items that were read, and are others than expected
        self.why = ""  # what is to be said of an item that is another than expected

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
        self.add(i, hashlib.sha256(data).digest())

    def hash(self, items: Iterable[int] | NDArray[np.int64]) -> None:
        """Read and hash these items, if they are not known; one that cannot be read stays unknown."""
        todo = [int(i) for i in items if self.pending[i]]

        def hash_piece(first: int) -> None:
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
                    end = min(begin + WINDOW, len(todo))
                    list(pool.map(hash_piece, range(begin, end, PIECE)))
                    tick(end, "")
                    self.rest()
        finally:
            pool.shutdown(cancel_futures=True)
            self.save()

    def expect(self, hashes: Hashed, why: str) -> None:
        """From now on an item is to be as here, where it is not zeros; `why` is said of one that is another."""
        self.expected = hashes
        self.why = why
        self.odd = set()

    def suspect(self, *, copies: bool = False) -> NDArray[np.int64]:
        """The items that are expected and not known, in files that changed since they were noted, or are copies."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        is_odd = (self.status == CHANGED) | (copies & (self.status == COPIED))
        if not is_odd.any():
            return np.zeros(0, np.int64)
        return np.flatnonzero(is_odd[self.files.owners] & self.expected.any(1) & ~self.known.any(1))

    def doubtful(self, items: range) -> bool:
        """Whether any of these items is known, or its file is not as it was noted."""
        span = slice(items.start, items.stop)
        is_odd = np.isin(self.status[self.files.owners[span]], (CHANGED, COPIED))
        return bool(is_odd.any() or self.known[span].any())

    def others(self) -> NDArray[np.int64]:
        """The items that are known to be others than expected."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        both = self.expected.any(1) & self.known.any(1)
        return np.flatnonzero(both & (self.expected != self.known).any(1))

    def seen(self) -> Hashed:
        """What was read so far, by this process or as is expected."""
        known = self.whole()
        if self.expected is None:
            return known
        return np.where(self.expected.any(1, keepdims=True), self.expected, known)

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


def hashes_of(source: object) -> Hashes | None:
    """Those of a source of images; None for one whose samples are no files."""
    hashes = getattr(source, "hashes", None)
    return hashes if isinstance(hashes, Hashes) else None


def unpacked(data: bytes) -> bytes:
    """The names that were packed. Raises UserError where they are damaged."""
    try:
        return zlib.decompress(data)
    except zlib.error as error:
        raise UserError(f"names of images are damaged ({error})") from error


def moved(then: bytes, now: bytes) -> str:
    """Which names are gone and which are new, in words."""
    old = set(split(then))
    new = set(split(now))
    changes: list[str] = []
    if old - new:
        changes.append(f"{few(sorted(old - new), without_slash)} gone")
    if new - old:
        changes.append(f"{few(sorted(new - old), without_slash)} new")
    return ", ".join(changes) or "they are in another order"


def without_slash(name: str) -> str:
    """A name below a folder as one reads it."""
    return name[1:]


def few(items: Sequence[Any], name: Callable[[Any], str] = str) -> str:
    """The names of the first few of many, and how many more there are."""
    text = ", ".join(map(name, items[:FEW]))
    more = len(items) - FEW
    return f"{text} and {more:,} more" if more > 0 else text
