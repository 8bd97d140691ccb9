"""Whether the shards of a table still hold what was written: each is compared with its SHA-256 once.

1. `Audit(folder, shards)` looks up which shards were found whole before: `.verified.json`, in the table's folder, has
   the size and time that their files had then. Those are not read. Ranks of one machine share the others.
2. If these have at most AT_ONCE_BYTES bytes, it reads them at once, which takes about a second for each GB, and raises
   UserError for a shard that has changed. Otherwise a thread reads them while training begins, so that a table of
   terabytes keeps nobody waiting.
3. The data call `Audit.require` before each batch. It raises what the thread has found; the steps until then are lost.

A byte that changes on a disk without a new time of its file, after the shard was found whole, is not noticed: `verify`,
which `dumo show RUN --check` calls, reads all shards.
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

AT_ONCE_BYTES = 2 * 10**9  # bytes that are read before the first batch, at most
FILE = ".verified.json"
_CHUNK_BYTES = 2**22  # bytes read at a time


@dataclass
class AuditState:
    """What the reading thread and the training tell each other."""

    fault: str = ""  # the message about the first changed shard; "": none was found so far
    is_over: Event = field(default_factory=Event)  # set: stop reading


class Audit:
    """The comparison of a table's shards with their checksums.

    Raises UserError for a shard that has changed: when it is made, or from `require`, once that is known.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Compare at once, or start the thread that compares."""
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
        """Raise UserError if a shard was found that has changed."""
        if self.state.fault:
            raise UserError(self.state.fault)


def verify(folder: Path, shards: Sequence[Shard]) -> None:
    """Compare all shards with their checksums, whatever was found before. Raises UserError for one that has changed."""
    state = AuditState()
    _compare_with_bar(folder, shards, state)
    if state.fault:
        raise UserError(state.fault)


def _compare_with_bar(folder: Path, shards: Sequence[Shard], state: AuditState) -> None:
    """Compare shards as `_compare`, with progress shown. Raises Stopped after a signal."""
    with bar("comparing the cache with its checksums", len(shards)) as tick:

        def note_progress(done: int) -> None:
            signals.check()
            tick(done, "")

        _compare(folder, shards, state, note_progress)


def _compare(
    folder: Path, shards: Sequence[Shard], state: AuditState, tick: Callable[[int], object] = lambda done: None
) -> None:
    """Compare shards with their checksums, and note those that are whole.

    Ends at the first that is not, with the message in `state.fault`, or once `state.is_over` is set. `tick` is called
    with the number of shards compared so far.
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
                state.fault = f"{folder}: {shard.file} has changed: its SHA-256 is another: {REMAKE}"
                return
            whole[shard.file] = file_state
            tick(done)
    finally:
        _note_verified(folder, whole)


def _is_verified(folder: Path, shard: Shard, verified: Mapping[str, list[int]]) -> bool:
    """Whether a shard was found whole, and its file has the size and time that it had then."""
    try:
        return verified.get(shard.file) == _state_of(folder / shard.file)
    except OSError:  # reading it says why
        return False


def _state_of(file: Path) -> list[int]:
    """Return the size of a file in bytes, and the time of its last change in ns. Raises OSError."""
    file_stat = file.stat()
    return [file_stat.st_size, file_stat.st_mtime_ns]


def _read_verified(folder: Path) -> dict[str, list[int]]:
    """Return the states of the shards that were found whole, by file.

    Nothing if there is no such file, or it is damaged.
    """
    try:
        content = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _note_verified(folder: Path, whole: Mapping[str, list[int]]) -> None:
    """Add shards to those that were found whole; does nothing where nothing may be written."""
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
    """The bytes of a file, _CHUNK_BYTES at a time, each in place of the one before."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as opened:
        while num_bytes := opened.readinto(buffer):
            yield buffer[:num_bytes]
