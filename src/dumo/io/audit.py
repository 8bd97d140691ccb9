"""Whether the shards of a table still hold what was written: each is compared with its SHA-256 once.

1. `Audit(folder, shards)` looks up which shards are noted as whole (`dumo.io.inventory`): those are not read. Ranks of
   one machine share the others.
2. If these have at most AT_ONCE_BYTES bytes, it reads them at once, which takes about a second for each GB, and raises
   UserError for a shard that has changed. Else a thread reads them while training begins, so that a table of terabytes
   keeps nobody waiting.
3. The data call `Audit.require` before each batch. It raises what the thread has found; the steps until then are lost.
4. A shard that is whole is noted, and read again only where its size or time is another. So the next start reads
   nothing.

A byte that changes on a disk without a new time of its file, after the shard was noted, is not noticed.
"""

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from dumo.io.inventory import FileState, Inventory, ItemFiles, state_of
from dumo.io.table import REMAKE, Shard
from dumo.runtime import signals
from dumo.runtime.progress import bar
from dumo.types import UserError

AT_ONCE_BYTES = 2 * 10**9  # bytes that are read before the first batch, at most: ours
_CHUNK_BYTES = 2**22  # bytes read at a time: ours
_NO_STATE = (-1, 0, 0)  # in place of the state of a file that cannot be looked at; reading it will raise the reason


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
        paths = [str((folder / shard.file).absolute()) for shard in shards]
        inventory = Inventory(ItemFiles.of(paths, [_state_of(path) for path in paths]), trust_copies=True)
        unread_shards: dict[int, Shard] = {}  # by number
        for number in range(rank, len(shards), ranks):
            if inventory.sha256[number].tobytes().hex() != shards[number].sha256:
                unread_shards[number] = shards[number]
        self.thread: Thread | None = None
        if sum(shard.size for shard in unread_shards.values()) <= AT_ONCE_BYTES:
            with bar("comparing the cache with its checksums", len(unread_shards)) as tick:

                def note_progress(done: int) -> None:
                    signals.check()
                    tick(done, "")

                _compare(folder, unread_shards, inventory, self.state, note_progress)
            self.require()
            return
        arguments = (folder, unread_shards, inventory, self.state)
        self.thread = Thread(target=_compare, args=arguments, name="audit", daemon=True)
        self.thread.start()
        weakref.finalize(self, self.state.is_over.set)  # the thread ends with the table

    def require(self) -> None:
        """Raise UserError if a shard was found that has changed."""
        if self.state.fault:
            raise UserError(self.state.fault)


def _compare(
    folder: Path,
    shards: dict[int, Shard],
    inventory: Inventory,
    state: AuditState,
    tick: Callable[[int], object] = lambda done: None,
) -> None:
    """Compare shards, given by their numbers, with their checksums, and note those that are whole.

    Ends at the first that is not, with the message in `state.fault`, or once `state.is_over` is set. `tick` is called
    with the number of shards compared so far.
    """
    try:
        for done, (number, shard) in enumerate(shards.items(), 1):
            try:
                sha256 = _sha256(folder / shard.file, state.is_over)
            except OSError as error:
                state.fault = f"{folder}: {shard.file} cannot be read ({error.strerror}): {REMAKE}"
                return
            if state.is_over.is_set():
                return
            if sha256 != shard.sha256:
                state.fault = f"{folder}: {shard.file} has changed: its SHA-256 is another: {REMAKE}"
                return
            inventory.add(number, bytes.fromhex(sha256))
            inventory.save_if_due()
            tick(done)
    finally:
        inventory.save()


def _state_of(path: str) -> FileState:
    """The state of a file, by which it is known again; _NO_STATE where it cannot be looked at."""
    try:
        return state_of(os.stat(path))
    except OSError:
        return _NO_STATE


def _sha256(file: Path, is_over: Event) -> str:
    """The SHA-256 of a file; "" if `is_over` is set first. Raises OSError where it cannot be read."""
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
