"""Verify the shards of a table: each is compared with its SHA-256 once.

1. `Audit(folder, shards)` skips shards that were verified before: `.verified.json` in the table's folder has the size
   and modification time of their files. The ranks of one machine share the other shards.
2. If these have at most AT_ONCE_BYTES bytes, it reads them immediately, which takes about one second per GB, and raises
   UserError for a changed shard. Otherwise a thread reads them while training starts, so that a large table does not
   delay it.
3. The data source calls `Audit.require` before each batch, which raises an error that the thread has found. The steps
   until then are lost.

A later change that keeps the modification time is only detected by `verify`, which reads all shards and is called by
`dumo show RUN --check`.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from dumo.io import file as files
from dumo.io.guard import locked
from dumo.io.table import REMAKE, Shard
from dumo.runtime import signals
from dumo.runtime.progress import bar
from dumo.types import UserError

AT_ONCE_BYTES = 2 * 10**9  # the maximum to read before the first batch
FILE = ".verified.json"
_CHUNK_BYTES = 2**22  # bytes read at a time


@dataclass
class AuditState:
    """The state that the reading thread shares with the training."""

    fault: str = ""  # the message about the first changed shard, or ""
    is_over: Event = field(default_factory=Event)  # set: stop reading


class Audit:
    """Compares a table's shards with their checksums.

    The constructor or `require` raises UserError for a changed shard.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Compare immediately, or start the thread that compares."""
        self.state = AuditState()
        rank = int(os.environ.get("LOCAL_RANK", 0))
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        verified = _read_verified(folder)
        unread_shards = [shard for shard in shards[rank::ranks] if not _is_verified(folder, shard, verified)]
        self.thread: Thread | None = None
        if sum(shard.size for shard in unread_shards) <= AT_ONCE_BYTES:
            _compare_with_bar(folder, unread_shards, self.state)
            self.require()
            return
        self.thread = Thread(target=_compare, args=(folder, unread_shards, self.state), name="audit", daemon=True)
        self.thread.start()
        weakref.finalize(self, self.state.is_over.set)  # the thread ends with the table

    def require(self) -> None:
        """Raise UserError if a changed shard was found."""
        if self.state.fault:
            raise UserError(self.state.fault)


def verify(folder: Path, shards: Sequence[Shard]) -> None:
    """Compare all shards with their checksums, verified or not. Raises UserError for a changed shard."""
    state = AuditState()
    _compare_with_bar(folder, shards, state)
    if state.fault:
        raise UserError(state.fault)


def _compare_with_bar(folder: Path, shards: Sequence[Shard], state: AuditState) -> None:
    """Call `_compare` with a progress bar. Raises Stopped after a signal."""
    with bar("comparing the cache with its checksums", len(shards)) as tick:

        def note_progress(done: int) -> None:
            signals.check()
            tick(done, "")

        _compare(folder, shards, state, note_progress)


def _compare(
    folder: Path, shards: Sequence[Shard], state: AuditState, tick: Callable[[int], object] = lambda done: None
) -> None:
    """Compare shards with their checksums, and record the undamaged ones.

    Stops at the first damaged shard, with the message in `state.fault`, or once `state.is_over` is set. Calls `tick`
    with the number of compared shards.
    """
    whole: dict[str, list[int]] = {}
    try:
        for done, shard in enumerate(shards, 1):
            try:
                file_state = _state_of(folder / shard.file)
                sha256 = _sha256(folder / shard.file, state.is_over)
            except OSError as error:
                state.fault = f"{folder}: {shard.file} cannot be read ({error.strerror}): {REMAKE}"
                return
            if state.is_over.is_set():
                return
            if sha256 != shard.sha256:
                state.fault = f"{folder}: {shard.file} has changed (different SHA-256): {REMAKE}"
                return
            whole[shard.file] = file_state
            tick(done)
    finally:
        _note_verified(folder, whole)


def _is_verified(folder: Path, shard: Shard, verified: Mapping[str, list[int]]) -> bool:
    """Whether a shard was verified, and its size and modification time have not changed."""
    try:
        return verified.get(shard.file) == _state_of(folder / shard.file)
    except OSError:  # reading the file raises it again
        return False


def _state_of(file: Path) -> list[int]:
    """Return the size of a file in bytes and its modification time in ns. Raises OSError."""
    file_stat = file.stat()
    return [file_stat.st_size, file_stat.st_mtime_ns]


def _read_verified(folder: Path) -> dict[str, list[int]]:
    """Return the states of verified shards, by file.

    The result is empty if the file is missing or damaged.
    """
    try:
        content = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _note_verified(folder: Path, whole: Mapping[str, list[int]]) -> None:
    """Record verified shards, unless the folder is read-only."""
    if not whole:
        return
    with suppress(OSError), locked(folder / f"{FILE}.lock"):
        files.write(folder / FILE, json.dumps(_read_verified(folder) | dict(whole)).encode())


def _sha256(file: Path, is_over: Event) -> str:
    """Return the SHA-256 of a file; "" if `is_over` is set first. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
        if is_over.is_set():
            return ""
    return digest.hexdigest()


def _chunks(file: Path) -> Iterator[memoryview]:
    """Yield the bytes of a file in chunks of _CHUNK_BYTES, which share one buffer."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as opened:
        while num_bytes := opened.readinto(buffer):
            yield buffer[:num_bytes]
