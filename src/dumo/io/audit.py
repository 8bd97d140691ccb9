"""Whether the shards of a table still hold what was written: each is compared with its SHA-256 once.

`Audit` reads the shards that no note says are whole (`dumo.io.inventory`): at once, if they have at most AT_ONCE_BYTES
bytes, which takes about a second for each GB. Else a thread reads them while training begins, and `Audit.require`,
called before each batch, raises what it found: the steps until then are lost, but a table of terabytes keeps nobody
waiting. A shard that is whole is noted, and read again only where its size or time is another: so the next start reads
nothing. Ranks of one machine share the work.

A number that changes on a disk without a new time, after its shard was noted, is not noticed.
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
from dumo.runtime.progress import delayed_bar
from dumo.types import UserError

AT_ONCE_BYTES = 2 * 10**9  # that are read before the first batch: ours
CHUNK_BYTES = 2**22  # read at a time
NO_STATE = (-1, 0, 0)  # of a shard that cannot be looked at: reading it says why


@dataclass
class AuditState:
    """What the reading thread and the training tell each other."""

    fault: str = ""  # of the first damaged shard; "": none was found so far
    end: Event = field(default_factory=Event)  # set: stop reading


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
        todo: dict[int, Shard] = {}
        for number in range(rank, len(shards), ranks):
            if inventory.sha256[number].tobytes().hex() != shards[number].sha256:
                todo[number] = shards[number]
        self.thread: Thread | None = None
        if sum(shard.size for shard in todo.values()) <= AT_ONCE_BYTES:
            with delayed_bar("comparing the cache with its checksums", len(todo)) as tick:

                def note_progress(done: int) -> None:
                    signals.check()
                    tick(done, "")

                _compare(folder, todo, inventory, self.state, note_progress)
            self.require()
            return
        self.thread = Thread(target=_compare, args=(folder, todo, inventory, self.state), name="audit", daemon=True)
        self.thread.start()
        weakref.finalize(self, self.state.end.set)  # the thread ends with the table

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
    """Compare shards, given by their numbers, and note those that are whole, until one is not."""
    try:
        for done, (number, shard) in enumerate(shards.items(), 1):
            try:
                sha256 = _sha256(folder / shard.file, state.end)
            except OSError as error:
                state.fault = f"{folder}: {shard.file} cannot be read ({error.strerror}): {REMAKE}"
                return
            if state.end.is_set():
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
    """The state of a shard's file, by which it is known again; NO_STATE where it cannot be looked at."""
    try:
        return state_of(os.stat(path))
    except OSError:
        return NO_STATE


def _sha256(file: Path, end: Event) -> str:
    """The SHA-256 of a file; "" if the end comes first. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
        if end.is_set():
            return ""
    return digest.hexdigest()


def _chunks(file: Path) -> Iterator[memoryview]:
    """The bytes of a file, CHUNK_BYTES at a time, each in place of the one before."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as opened:
        while n := opened.readinto(buffer):
            yield buffer[:n]
