"""What images held when they were read, so that a changed image is refused by name.

A record of an image is its size in bytes, the time of the last change of its file, and 16 bytes of the SHA-256 of its
bytes. The order of events:

1. A source of images (`dumo.data.images.Source`) has a `Ledger`. Each image that is read is hashed and compared: with
   what it was when it was read before, and with what is expected.
2. A run writes the records of new images to one file in its folder, to which it only appends (`append`). A checkpoint
   holds the length and the SHA-256 of that file. A cache of latents holds the records of the images that it was made of
   (`dumo.data.cache`).
3. On resume, `Ledger.expect` takes the records. Images of another size or time (`suspects`) are hashed at once; all
   others are compared when they are read.

A content that changed in place, with its size and time kept, is noticed when the image is read, or where all images are
hashed (`dumo show RUN --check`).
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

FILE = "images.ledger"  # in a run's folder
HASH_BYTES = 16
RECORD = np.dtype([("image", "<i8"), ("size", "<i8"), ("time", "<i8"), ("sha256", "u1", HASH_BYTES)])

# The file is a sequence of blocks: a kind, the number of bytes that follow, and these. A block of names begins the
# records anew, as where a run resumes on data that were changed on purpose.
_BLOCK = struct.Struct("<4sQ")
_NAMES = b"NAME"
_RECORDS = b"ROWS"

_THREADS = min(16, cores())
_CHUNK_IMAGES = 64
_CHANGED = "is not what it was when it was read before: put it back as it was"


@dataclass(frozen=True)
class Recorded:
    """The records of all images of a data set, with zeros for a hash that is not known."""

    names: bytes  # as `Ledger.names_bytes`
    classes: str  # as `Ledger.classes_digest`
    records: NDArray[np.void]  # (n,), of RECORD


class Ledger:
    """The records of the images of some rows, and what is expected of them. It may be used from several threads."""

    def __init__(self, rows: Rows, labels: Tensor | None = None) -> None:
        """Begin without hashes. `labels` are the classes of the images, (n,)."""
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
        """Hash image i, of which `data` was just read. Raises UserError, with its name, if it has changed."""
        before = self._known_or_expected(i)
        now = hashlib.sha256(data).digest()[:HASH_BYTES]
        if before is not None and before != now:
            raise UserError(f"{self.rows.path(i)} {self.problem}")
        self._add(i, now)

    def hash(self, images: Iterable[int] | NDArray[np.int64]) -> None:
        """Read and hash images whose hash is not known yet, on threads. An image that cannot be read is left out."""
        numbers = [int(i) for i in images if not self.is_known[i]]

        def hash_chunk(first: int) -> None:
            for i in numbers[first : first + _CHUNK_IMAGES]:
                try:
                    data = self.rows.read(i)
                except (OSError, ValueError):
                    continue  # decoding it says why
                self._add(i, hashlib.sha256(data).digest()[:HASH_BYTES])

        window = _CHUNK_IMAGES * _THREADS
        with ThreadPoolExecutor(_THREADS, "hash") as pool, bar("hashing images", len(numbers)) as tick:
            for begin in range(0, len(numbers), window):
                signals.check()
                end = min(begin + window, len(numbers))
                list(pool.map(hash_chunk, range(begin, end, _CHUNK_IMAGES)))
                tick(end, "")

    def expect(self, records: NDArray[np.void], problem: str) -> None:
        """From now on expect these records (n,). `problem` follows the name of an image that is another."""
        self.expected = records
        self.problem = problem

    def learn(self, records: NDArray[np.void], problem: str) -> None:
        """Expect, besides what is expected, what other ranks have read."""
        if self.expected is None:
            self.expected = np.zeros(len(self), RECORD)
        self.expected[records["image"]] = records
        self.problem = problem

    def suspects(self) -> NDArray[np.int64]:
        """The images of another size or time than expected, whose hash is not known yet."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        is_other = (self.records["size"] != self.expected["size"]) | (self.records["time"] != self.expected["time"])
        return np.flatnonzero(is_other & self.expected["sha256"].any(1) & ~self.is_known)

    def changed(self) -> NDArray[np.int64]:
        """The images that are known to be others than expected: by their hashes, else by their sizes."""
        if self.expected is None:
            return np.zeros(0, np.int64)
        is_hashed = self.expected["sha256"].any(1)
        has_other_hash = (self.records["sha256"] != self.expected["sha256"]).any(1)
        is_listed = (self.expected["size"] != 0) | (self.expected["time"] != 0)
        has_other_size = is_listed & (self.records["size"] != self.expected["size"])
        return np.flatnonzero(np.where(is_hashed & self.is_known, has_other_hash, has_other_size))

    def difference(self, recorded: Recorded) -> str:
        """Which images are gone and which are new since these records, or that classes differ; "" if nothing does."""
        if recorded.names != self.names_bytes:
            return _name_changes(recorded.names, self.names_bytes)
        return "" if recorded.classes == self.classes_digest else "their classes are others"

    def changed_text(self, images: Sequence[int] | NDArray[np.int64]) -> str:
        """The first of some changed images by name, and how many more there are."""
        return first_few([int(i) for i in images], self.rows.path)

    def recorded(self) -> Recorded:
        """The present records, with zeros for hashes that are not known."""
        return Recorded(self.names_bytes, self.classes_digest, self.records.copy())

    def take_new(self) -> NDArray[np.void]:
        """The records of the images that were hashed since the last call."""
        with self._lock:
            images, self._new = self._new, []
        return self.records[images]

    @cached_property
    def names_bytes(self) -> bytes:
        """The names of all images, with NUL between them, which no name holds."""
        return "\0".join(self.rows.names).encode("utf-8", "surrogateescape")

    @cached_property
    def classes_digest(self) -> str:
        """A SHA-256 of the classes."""
        return digest.of_bytes(b"") if self.labels is None else digest.of_tensor(self.labels)

    def names_digest(self) -> str:
        """A short text that changes if images are added, removed or renamed, or get other classes."""
        return digest.short(digest.of_bytes(self.names_bytes), self.classes_digest, self.rows.mark)

    def fingerprint(self, *more: str) -> str:
        """As `names_digest`; it changes also if an image has another size, or with `more`."""
        sizes = digest.of_bytes(self.records["size"].tobytes())
        return digest.short(self.names_digest(), sizes, *more)

    def _known_or_expected(self, i: int) -> bytes | None:
        """The hash that image i is to have; None: any."""
        if self.is_known[i]:
            return self.records["sha256"][i].tobytes()
        if self.expected is not None and self.expected["sha256"][i].any():
            return self.expected["sha256"][i].tobytes()
        return None

    def _add(self, i: int, sha256: bytes) -> None:
        """Note the hash of image i, unless it is known."""
        if self.is_known[i]:
            return
        self.records["sha256"][i] = np.frombuffer(sha256, np.uint8)
        self.is_known[i] = True
        with self._lock:
            self._new.append(i)


def ledger_of(source: object) -> Ledger | None:
    """The ledger of a source of images; None for a source whose samples are no files."""
    ledger = getattr(source, "ledger", None)
    return ledger if isinstance(ledger, Ledger) else None


def begin(file: Path, ledger: Ledger) -> None:
    """Begin the records in a run's file, with the names, sizes and times of all images."""
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
    """The records in the first `length` bytes of a run's file; of several of an image, the last one counts.

    Raises UserError if the file is shorter, or damaged.
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
        raise UserError(f"{file} is damaged, which holds what the images were ({error}): bring it back") from error
    return Recorded(names, classes, records)


def truncate(file: Path, length: int) -> None:
    """Drop what was appended to a run's file after its first `length` bytes."""
    if file.exists() and file.stat().st_size > length:
        with file.open("r+b") as opened:
            opened.truncate(length)


def _append_block(file: Path, kind: bytes, content: bytes) -> None:
    """Append a block. Raises OSError, and UserError as `require_in_place`."""
    require_in_place(file)
    with file.open("ab") as opened:
        opened.write(_BLOCK.pack(kind, len(content)) + content)


def _name_changes(then: bytes, now: bytes) -> str:
    """Which names are gone and which are new, in words."""
    names_then = set(then.decode("utf-8", "surrogateescape").split("\0"))
    names_now = set(now.decode("utf-8", "surrogateescape").split("\0"))
    changes: list[str] = []
    if names_then - names_now:
        changes.append(f"{first_few(sorted(names_then - names_now))} gone")
    if names_now - names_then:
        changes.append(f"{first_few(sorted(names_now - names_then))} new")
    return ", ".join(changes) or "they are in another order"
