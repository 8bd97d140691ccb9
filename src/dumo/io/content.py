"""What the items of a data set hold, by SHA-256, and what they are expected to hold.

`Hashes` is an inventory (`dumo.io.inventory`) of a data set's items; `dumo.io.source.hashes_of` gives that of a source.
The order of events:

1. Training, or the making of a cache, reads items. `check_item` hashes each that is read for the first time; it is
   never hashed again as long as its file is as it was noted. A checkpoint or a cache keeps the hashes, `packed_names`
   and `labels_digest`.
2. A later start expects the kept hashes again, by `expect`. What it does then depends on an item's file:

       it is as noted                       the noted hash is compared at once (`mismatches`)
       its size or time changed             the item is hashed at once (`hash` of the `suspects`)
       its inode alone changed: a copy      the item is hashed when it is read
       nobody noted it on this machine      the item is hashed when it is read

3. `check_item` raises UserError for an item that is read, and is another than expected.

`unpack_names` and `name_changes` are for messages about names. An item whose content changed in place, with its time
set back, is noticed only where all hashes are forgotten first (`forget`).
"""

import hashlib
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
from dumo.runtime.progress import bar
from dumo.runtime.threads import cores
from dumo.types import UserError

_CHUNK_ITEMS = 64  # that a thread hashes in one task: ours
_WINDOW_ITEMS = 4096  # that all threads hash between two looks at signals: ours
MAX_THREADS = 16  # ours


class Hashes(Inventory):
    """The hashes of the items of a data set: those that are known, and those that are expected."""

    def __init__(
        self, files: ItemFiles, path: Callable[[int], str], read: Callable[[int], bytes], classes: Tensor | None = None
    ) -> None:
        """Look up what is noted.

        path: names item i in messages.
        read: the bytes of item i; it is called from many threads at once.
        classes: of the items, (n,); None: there are none.
        """
        super().__init__(files)
        self.path = path
        self.read = read
        self.classes = classes
        self.expected: HashRows | None = None  # zeros where nothing is expected of an item
        self.refused = set[int]()  # items that were read, and are others than expected
        self.problem = ""  # what a message says of a refused item

    def check_item(self, i: int, data: bytes) -> None:
        """Hash item i, of which `data` was just read, unless its hash is known, and compare it with the expected one.

        Raises UserError, with its name, where another content is expected. May be called from many threads.
        """
        if self.pending[i]:
            self._hash(i, data)
            if self._differs(i):
                self.refused.add(i)
                self.save()
        if i in self.refused:
            raise UserError(f"{self.path(i)} {self.problem}")

    def hash(self, items: Iterable[int] | NDArray[np.int64]) -> None:
        """Read and hash items, on threads, unless their hash is known. An item that cannot be read stays pending."""
        pending_items = [int(i) for i in items if self.pending[i]]

        def hash_chunk(first: int) -> None:
            for i in pending_items[first : first + _CHUNK_ITEMS]:
                try:
                    self._hash(i, self.read(i))
                except (OSError, ValueError):  # decoding it will raise, with a better message
                    continue

        pool = ThreadPoolExecutor(min(MAX_THREADS, cores()), thread_name_prefix="hash")
        try:
            with bar("hashing images", len(pending_items)) as tick:
                for begin in range(0, len(pending_items), _WINDOW_ITEMS):
                    signals.check()
                    end = min(begin + _WINDOW_ITEMS, len(pending_items))
                    list(pool.map(hash_chunk, range(begin, end, _CHUNK_ITEMS)))
                    tick(end, "")
                    self.save_if_due()
        finally:
            pool.shutdown(cancel_futures=True)
            self.save()

    def expect(self, hashes: HashRows, problem: str) -> None:
        """From now on expect these hashes (n, 32); zeros: nothing is expected of that item.

        `problem` follows the item's name in the message about an item that is another.
        """
        self.expected = hashes
        self.problem = problem
        self.refused = set()

    def suspects(self, *, copies: bool = False) -> NDArray[np.int64]:
        """The items to hash at once: a hash is expected, none is known, and their file changed since it was noted.

        Returns their numbers. `copies`: also those in files that are copies.
        """
        if self.expected is None:
            return np.zeros(0, np.int64)
        suspect_status = (CHANGED, COPIED) if copies else (CHANGED,)
        is_suspect_file = np.isin(self.status, suspect_status)
        if not is_suspect_file.any():
            return np.zeros(0, np.int64)
        is_suspect = is_suspect_file[self.files.file_of_item]
        return np.flatnonzero(is_suspect & self.expected.any(1) & ~self.sha256.any(1))

    def is_doubtful(self, items: range) -> bool:
        """Whether the hash of any of the items is known, or its file is not as it was noted."""
        rows = slice(items.start, items.stop)
        is_other_file = np.isin(self.status[self.files.file_of_item[rows]], (CHANGED, COPIED))
        return bool(is_other_file.any() or self.sha256[rows].any())

    def mismatches(self) -> NDArray[np.int64]:
        """The numbers of the items whose hashes are known, and are not those expected."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        is_compared = self.expected.any(1) & self.sha256.any(1)
        return np.flatnonzero(is_compared & (self.expected != self.sha256).any(1))

    def expected_or_known_hashes(self) -> HashRows:
        """For each item the expected hash, else the known one, else zeros: (n, 32)."""
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
        """A SHA-256 of the items' classes."""
        return digest.of_bytes(b"") if self.classes is None else digest.of_tensor(self.classes)

    def fingerprint(self) -> str:
        """A short text that changes where items are added, removed or renamed, or get other classes."""
        return digest.short(digest.of_bytes(self.names), self.labels_digest())

    def digest(self, items: Sequence[int]) -> str:
        """A SHA-256 of the hashes of some items, which must be known."""
        return digest.of_bytes(self.sha256[items].tobytes())

    def file_bytes(self, items: NDArray[np.int64]) -> int:
        """The bytes of the files that some items lie in."""
        return int(self.files.states[np.unique(self.files.file_of_item[items]), 0].sum())

    def _hash(self, i: int, data: bytes) -> None:
        self.add(i, hashlib.sha256(data).digest())

    def _differs(self, i: int) -> bool:
        """Whether item i, whose hash is known, is expected to be another."""
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
    """Which names are gone and which are new, in words. Both arguments are as `Hashes.names`."""
    names_then = set(split_names(then))
    names_now = set(split_names(now))
    gone = names_then - names_now
    new = names_now - names_then
    changes: list[str] = []
    if gone:
        changes.append(f"{first_few(sorted(gone), _without_slash)} gone")
    if new:
        changes.append(f"{first_few(sorted(new), _without_slash)} new")
    return ", ".join(changes) or "they are in another order"


def _without_slash(name: str) -> str:
    """A name below a folder, without the slash in front."""
    return name[1:]
