"""Hashes of all images that were read, so that changed images are refused by name.

The record of an image is its size in bytes, the modification time of its file, and 16 bytes of the SHA-256 of its
bytes.

1. A source of images (`dumo.data.images.Source`) has a `Ledger`. Each image is hashed when it is read, and compared
   with its earlier and its expected hash.
2. A run appends the records of new images to a file in its folder (`append`). A checkpoint has the length and the
   SHA-256 of that file. A cache of latents has the records of its images (`dumo.data.cache`).
3. On resume, `Ledger.expect` sets the expected records. Images whose size or time changed (`suspects`) are hashed
   immediately, the rest when they are read.

If the content changes but size and time do not, this is detected when the image is read, or when all images are hashed
(`dumo show RUN --check`).
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dumo.data.rows import Rows
from dumo.io import digest
from dumo.io.guard import require_in_place
from dumo.io.read import first_few
from dumo.runtime import signals
from dumo.runtime.progress import bar
from dumo.runtime.threads import cores
from dumo.types import UserError

FILE = "images.ledger"
HASH_BYTES = 16
RECORD = np.dtype([("image", "<i8"), ("size", "<i8"), ("time", "<i8"), ("sha256", "u1", HASH_BYTES)])

# The file is a sequence of blocks: a kind, the number of bytes, and the bytes. A block of names replaces all earlier
# records, as when a run continues on data that were changed on purpose.
_BLOCK = struct.Struct("<4sQ")
_NAMES = b"NAME"
_RECORDS = b"ROWS"

_THREADS = min(16, cores())
_CHUNK_IMAGES = 64
_CHANGED = "has changed since it was first read: restore it"


@dataclass(frozen=True)
class Recorded:
    """The records of all images of a data set. Unknown hashes are zeros.

    names: in the format of `Ledger.names_bytes`.
    classes: in the format of `Ledger.classes_digest`.
    records: (n,), of dtype RECORD.
    """

    names: bytes
    classes: str
    records: NDArray[np.void]


class Ledger:
    """The records of images, and the records expected of them. Thread-safe."""

    def __init__(self, rows: Rows, labels: Tensor | None = None) -> None:
        """Start without hashes. `labels` are the classes of the images, (n,)."""
        self.rows = rows
        self.labels = labels
        self.records = np.zeros(len(rows), RECORD)
        self.records["image"] = np.arange(len(rows))
        self.records["size"] = rows.states[:, 0]
        self.records["time"] = rows.states[:, 1]
        self.is_known = np.zeros(len(rows), bool)
        self.expected: NDArray[np.void] | None = None
        self.problem = _CHANGED
        self._new: list[int] = []
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.records)

    def check(self, i: int, data: bytes) -> None:
        """Hash the bytes `data` of image i. Raises UserError, with its name, if it has changed."""
        before = self._known_or_expected(i)
        now = hashlib.sha256(data).digest()[:HASH_BYTES]
        if before is not None and before != now:
            raise UserError(f"{self.rows.path(i)} {self.problem}")
        self._add(i, now)

    def hash(self, images: Iterable[int] | NDArray[np.int64]) -> None:
        """Read and hash images with unknown hashes, on threads. Unreadable images are skipped."""
        numbers = [int(i) for i in images if not self.is_known[i]]

        def hash_chunk(first: int) -> None:
            for i in numbers[first : first + _CHUNK_IMAGES]:
                try:
                    data = self.rows.read(i)
                except (OSError, ValueError):
                    # Decoding it raises the error.
                    continue
                self._add(i, hashlib.sha256(data).digest()[:HASH_BYTES])

        window = _CHUNK_IMAGES * _THREADS
        with ThreadPoolExecutor(_THREADS, "hash") as pool, bar("hashing images", len(numbers)) as tick:
            for begin in range(0, len(numbers), window):
                signals.check()
                end = min(begin + window, len(numbers))
                list(pool.map(hash_chunk, range(begin, end, _CHUNK_IMAGES)))
                tick(end, "")

    def expect(self, records: NDArray[np.void], problem: str) -> None:
        """Set the expected records (n,). `problem` follows the name of a changed image in errors."""
        self.expected = records
        self.problem = problem

    def expect_more(self, records: NDArray[np.void], problem: str) -> None:
        """Add records to the expected ones, such as those read by other ranks."""
        if self.expected is None:
            self.expected = np.zeros(len(self), RECORD)
        self.expected[records["image"]] = records
        self.problem = problem

    def suspects(self) -> NDArray[np.int64]:
        """Return the images whose size or time differs from the expected one, and whose hash is unknown."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        is_other = (self.records["size"] != self.expected["size"]) | (self.records["time"] != self.expected["time"])
        return np.flatnonzero(is_other & self.expected["sha256"].any(1) & ~self.is_known)

    def changed(self) -> NDArray[np.int64]:
        """Return the images that differ from the expected ones, by hash if known, else by size."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        is_hashed = self.expected["sha256"].any(1)
        has_other_hash = (self.records["sha256"] != self.expected["sha256"]).any(1)
        is_listed = (self.expected["size"] != 0) | (self.expected["time"] != 0)
        has_other_size = is_listed & (self.records["size"] != self.expected["size"])
        return np.flatnonzero(np.where(is_hashed & self.is_known, has_other_hash, has_other_size))

    def difference(self, recorded: Recorded) -> str:
        """Describe removed and new images since these records, or changed classes; "" if there is no difference."""
        if recorded.names != self.names_bytes:
            return _name_changes(recorded.names, self.names_bytes)
        return "" if recorded.classes == self.classes_digest else "with different classes"

    def changed_text(self, images: Sequence[int] | NDArray[np.int64]) -> str:
        """Return the names of the first changed images, and the number of further ones."""
        return first_few([int(i) for i in images], self.rows.path)

    def recorded(self) -> Recorded:
        """Return the present records, with zeros for unknown hashes."""
        return Recorded(self.names_bytes, self.classes_digest, self.records.copy())

    def take_new(self) -> NDArray[np.void]:
        """Return the records of all images hashed since the last call."""
        with self._lock:
            images, self._new = self._new, []
        return self.records[images]

    @cached_property
    def names_bytes(self) -> bytes:
        """The names of all images, separated by NUL, which does not occur in names."""
        return "\0".join(self.rows.names).encode("utf-8", "surrogateescape")

    @cached_property
    def classes_digest(self) -> str:
        """The SHA-256 of the classes."""
        return digest.of_bytes(b"") if self.labels is None else digest.of_tensor(self.labels)

    def names_digest(self) -> str:
        """Return a digest of the names and classes of all images."""
        return digest.short(digest.of_bytes(self.names_bytes), self.classes_digest, self.rows.content_digest)

    def fingerprint(self, *more: str) -> str:
        """Return a digest of the names, classes and sizes of all images, and of `more`."""
        sizes = digest.of_bytes(self.records["size"].tobytes())
        return digest.short(self.names_digest(), sizes, *more)

    def _known_or_expected(self, i: int) -> bytes | None:
        """Return the hash that image i must have; None if it is unknown."""
        if self.is_known[i]:
            return self.records["sha256"][i].tobytes()
        if self.expected is not None and self.expected["sha256"][i].any():
            return self.expected["sha256"][i].tobytes()
        return None

    def _add(self, i: int, sha256: bytes) -> None:
        """Record the hash of image i, unless it is known."""
        if self.is_known[i]:
            return
        self.records["sha256"][i] = np.frombuffer(sha256, np.uint8)
        self.is_known[i] = True
        with self._lock:
            self._new.append(i)


def ledger_of(source: object) -> Ledger | None:
    """Return the ledger of a source of images; None if samples are not files."""
    ledger = getattr(source, "ledger", None)
    return ledger if isinstance(ledger, Ledger) else None


def start(file: Path, ledger: Ledger) -> None:
    """Start new records in a run's file, with the names, sizes and times of all images."""
    without_hashes = ledger.records.copy()
    without_hashes["sha256"] = 0
    names = zlib.compress(ledger.names_bytes, 1)
    _append_block(file, _NAMES, bytes.fromhex(ledger.classes_digest) + names)
    append(file, without_hashes)


def append(file: Path, records: NDArray[np.void]) -> None:
    """Append records to a run's file."""
    if len(records):
        _append_block(file, _RECORDS, records.tobytes())


def read(file: Path, length: int) -> Recorded:
    """Read the records in the first `length` bytes of a run's file. The last record of an image is used.

    Raises UserError if the file is shorter or damaged.
    """
    content = file.read_bytes()[:length] if file.exists() else b""
    names = b""
    classes = ""
    blocks: list[NDArray[np.void]] = []
    try:
        if len(content) < length:
            raise ValueError(f"it has {len(content):,} of {length:,} bytes")
        position = 0
        while position < length:
            kind, size = _BLOCK.unpack_from(content, position)
            block = content[position + _BLOCK.size : position + _BLOCK.size + size]
            position += _BLOCK.size + size
            if kind == _NAMES:
                classes = block[:32].hex()
                names = zlib.decompress(block[32:])
                blocks = []
            else:
                blocks.append(np.frombuffer(block, RECORD))
        records = np.zeros(names.count(b"\0") + 1, RECORD)
        for of_block in blocks:
            records[of_block["image"]] = of_block
    except (ValueError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{file}, the record of the run's images, is damaged ({error}): restore it") from error
    return Recorded(names, classes, records)


def truncate(file: Path, length: int) -> None:
    """Truncate a run's file to its first `length` bytes."""
    if file.exists() and file.stat().st_size > length:
        with file.open("r+b") as opened:
            opened.truncate(length)


def _append_block(file: Path, kind: bytes, content: bytes) -> None:
    """Append a block. Raises OSError, and UserError as `require_in_place`."""
    require_in_place(file)
    with file.open("ab") as opened:
        opened.write(_BLOCK.pack(kind, len(content)) + content)


def _name_changes(then: bytes, now: bytes) -> str:
    """Describe removed and new names."""
    names_then = set(then.decode("utf-8", "surrogateescape").split("\0"))
    names_now = set(now.decode("utf-8", "surrogateescape").split("\0"))
    changes: list[str] = []
    if names_then - names_now:
        changes.append(f"{first_few(sorted(names_then - names_now))} gone")
    if names_now - names_then:
        changes.append(f"{first_few(sorted(names_now - names_then))} new")
    return ", ".join(changes) or "in a different order"
