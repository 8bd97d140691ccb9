"""What is in the items of a data set, by SHA-256, and what they are expected to hold.

`Hashes` is an inventory (`dumo.io.inventory`) of the items of a source, `dumo.io.source.hashes_of` gives it. An item is
hashed when it is read for the first time (`Hashes.see`, `Hashes.hash`), and never again as long as its file is as it
was noted. A checkpoint or a cache keeps the hashes of the items that it was made of, and expects them again
(`Hashes.expect`):

    the file is as noted                    the noted hash is compared at once (`mismatches`)
    its size or time changed                it is hashed at once (`suspect`)
    its inode alone changed: a copy         it is hashed when it is read
    nobody noted it on this machine         it is hashed when it is read

An item whose content changed in place, with its time set back, is noticed only where all hashes are forgotten first.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dumo.io import digest
from dumo.io.inventory import CHANGED, COPIED, HashRows, Inventory, ItemFiles, join_names, split_names
from dumo.io.read import first_few
from dumo.runtime import signals
from dumo.runtime.progress import delayed_bar
from dumo.types import UserError

CHUNK_ITEMS = 64  # that a thread hashes in one go: ours
WINDOW_ITEMS = 4096  # that all threads hash between two looks at signals: ours
MAX_THREADS = 16  # ours


class Hashes(Inventory):
    """The hashes of the items of a data set: those that are known, and those that are expected."""

    def __init__(
        self, files: ItemFiles, path: Callable[[int], str], read: Callable[[int], bytes], classes: Tensor | None = None
    ) -> None:
        """Look up what is noted. `path` names an item, `read` gives its bytes, from many threads at once."""
        super().__init__(files)
        self.path = path
        self.read = read
        self.classes = classes
        self.expected: HashRows | None = None  # zeros where nothing is expected of an item
        self.refused = set[int]()  # items that were read, and are others than expected
        self.problem = ""  # what a message says of a refused item

    def see(self, i: int, data: bytes) -> None:
        """Hash item i as it is read, if it is pending. Raises UserError, with its name, where another is expected.

        May be called from many threads.
        """
        if self.pending[i]:
            self._hash(i, data)
            if self._differs(i):
                self.refused.add(i)
                self.save()
        if i in self.refused:
            raise UserError(f"{self.path(i)} {self.problem}")

    def hash(self, items: Iterable[int] | NDArray[np.int64]) -> None:
        """Read and hash items, if they are pending; one that cannot be read stays pending."""
        todo = [int(i) for i in items if self.pending[i]]

        def hash_chunk(first: int) -> None:
            for i in todo[first : first + CHUNK_ITEMS]:
                try:
                    self._hash(i, self.read(i))
                except (OSError, ValueError):  # who decodes it says so
                    continue

        pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="hash")
        try:
            with delayed_bar("hashing images", len(todo)) as tick:
                for begin in range(0, len(todo), WINDOW_ITEMS):
                    signals.check()
                    end = min(begin + WINDOW_ITEMS, len(todo))
                    list(pool.map(hash_chunk, range(begin, end, CHUNK_ITEMS)))
                    tick(end, "")
                    self.save_if_due()
        finally:
            pool.shutdown(cancel_futures=True)
            self.save()

    def expect(self, hashes: HashRows, problem: str) -> None:
        """From now on expect these hashes (n, 32), where they are not zeros; `problem` is said of another item."""
        self.expected = hashes
        self.problem = problem
        self.refused = set()

    def suspect(self, *, copies: bool = False) -> NDArray[np.int64]:
        """The pending items of which something is expected, in files that changed since they were noted.

        `copies`: also in files that are copies.
        """
        if self.expected is None:
            return np.zeros(0, np.int64)
        is_suspect = (self.status == CHANGED) | (copies & (self.status == COPIED))  # by file
        if not is_suspect.any():
            return np.zeros(0, np.int64)
        return np.flatnonzero(is_suspect[self.files.file_of_item] & self.expected.any(1) & ~self.sha256.any(1))

    def is_doubtful(self, items: range) -> bool:
        """Whether the hash of any of the items is known, or its file is not as it was noted."""
        span = slice(items.start, items.stop)
        is_other = np.isin(self.status[self.files.file_of_item[span]], (CHANGED, COPIED))
        return bool(is_other.any() or self.sha256[span].any())

    def mismatches(self) -> NDArray[np.int64]:
        """The items whose hashes are known, and other than expected."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        is_compared = self.expected.any(1) & self.sha256.any(1)
        return np.flatnonzero(is_compared & (self.expected != self.sha256).any(1))

    def expected_or_known(self) -> HashRows:
        """The expected hash of each item, else the known one, else zeros: (n, 32)."""
        known = self.known_hashes()
        if self.expected is None:
            return known
        return np.where(self.expected.any(1, keepdims=True), self.expected, known)

    @cached_property
    def names(self) -> bytes:
        """The items' names below the folder that holds all files, as `join_names` has them."""
        return join_names(self.path(i)[len(self.files.folder) :] for i in range(len(self)))

    @cached_property
    def packed_names(self) -> Tensor:
        """The names, compressed, as a tensor of bytes: `unpack_names` undoes it."""
        return torch.from_numpy(np.frombuffer(zlib.compress(self.names, 1), np.uint8).copy())

    def labels_digest(self) -> str:
        """A hash of the items' classes."""
        return digest.of_bytes(b"") if self.classes is None else digest.of_tensor(self.classes)

    def fingerprint(self) -> str:
        """A short text, another one where items were added, removed or renamed, or have other classes."""
        return digest.short(digest.of_bytes(self.names), self.labels_digest())

    def digest(self, items: Sequence[int]) -> str:
        """A hash of the hashes of some items."""
        return digest.of_bytes(self.sha256[items].tobytes())

    def file_bytes(self, items: NDArray[np.int64]) -> int:
        """The bytes of the files that some items lie in."""
        return int(self.files.states[np.unique(self.files.file_of_item[items]), 0].sum())

    def _hash(self, i: int, data: bytes) -> None:
        self.add(i, hashlib.sha256(data).digest())

    def _differs(self, i: int) -> bool:
        """Whether another content of item i is expected."""
        if self.expected is None or not self.expected[i].any():
            return False
        return bool((self.expected[i] != self.sha256[i]).any())


def unpack_names(data: bytes) -> bytes:
    """The names that `Hashes.packed_names` holds. Raises UserError where they are damaged."""
    try:
        return zlib.decompress(data)
    except zlib.error as error:
        raise UserError(f"names of images are damaged ({error})") from error


def name_changes(then: bytes, now: bytes) -> str:
    """Which names are gone and which are new, in words. Both are names of items as `Hashes.names` has them."""
    old = set(split_names(then))
    new = set(split_names(now))
    changes: list[str] = []
    if old - new:
        changes.append(f"{first_few(sorted(old - new), _without_slash)} gone")
    if new - old:
        changes.append(f"{first_few(sorted(new - old), _without_slash)} new")
    return ", ".join(changes) or "they are in another order"


def _without_slash(name: str) -> str:
    """A name below a folder, without the slash in front."""
    return name[1:]
