"""Whether the shards of a table still hold what was written: each is compared with its SHA-256 once.

A GB takes about a second, so a small table is read through when it is opened. A larger one is read through by a thread
while training begins, and a fault is raised with the next batch: the steps until then are lost, but a table of
terabytes keeps nobody waiting. A shard that is whole is noted (`dumo.io.seen`), and read again only where its size or
time is another: so the next start reads nothing. Ranks of one machine share the work.

A number that changes on a disk without a new time, after it was noted, is not noticed.
"""

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from dumo.io.seen import Files, SeenFiles, State, state_of
from dumo.io.table import REMAKE, Shard
from dumo.runtime import signals
from dumo.runtime.progress import late
from dumo.types import UserError

SOON = 2 * 10**9  # bytes that are read through before the first batch: ours
PIECE = 2**22  # bytes read at a time
NO_STATE = (-1, 0, 0)  # of a shard that cannot be looked at: reading it says why


@dataclass
class AuditState:
    """What was found so far, and whether to go on looking."""

    fault: str = ""
    end: Event = field(default_factory=Event)


class Audit:
    """Raises UserError for a shard that has changed: when it is made, or from `require`, once that is known."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Begin; at most `SOON` bytes are done at once."""
        self.state = AuditState()
        rank = int(os.environ.get("LOCAL_RANK", 0))
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        paths = [str((folder / shard.file).absolute()) for shard in shards]
        seen = SeenFiles(Files.of(paths, [_state(path) for path in paths]), trust_copies=True)
        todo: dict[int, Shard] = {}
        for number in range(rank, len(shards), ranks):
            if seen.known[number].tobytes().hex() != shards[number].sha256:
                todo[number] = shards[number]
        self.thread: Thread | None = None
        if sum(shard.size for shard in todo.values()) <= SOON:
            with late("comparing the cache with its checksums", len(todo)) as tick:

                def note_progress(done: int) -> None:
                    signals.check()
                    tick(done, "")

                _look(folder, todo, seen, self.state, note_progress)
            self.require()
            return
        self.thread = Thread(target=_look, args=(folder, todo, seen, self.state), name="audit", daemon=True)
        self.thread.start()
        weakref.finalize(self, self.state.end.set)  # the thread ends with the table

    def require(self) -> None:
        """Raise UserError if a shard was found that has changed."""
        if self.state.fault:
            raise UserError(self.state.fault)


def _look(
    folder: Path,
    shards: dict[int, Shard],
    seen: SeenFiles,
    state: AuditState,
    tick: Callable[[int], object] = lambda done: None,
) -> None:
    """Compare shard by shard, by their numbers, and note which are whole, until one is not."""
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
            seen.add(number, bytes.fromhex(sha256))
            seen.rest()
            tick(done)
    finally:
        seen.save()


def _state(path: str) -> State:
    """By what a shard that was found whole is known again."""
    try:
        return state_of(os.stat(path))
    except OSError:
        return NO_STATE


def _sha256(file: Path, end: Event) -> str:
    """Of a file; "" if the end comes first. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    for piece in _pieces(file):
        digest.update(piece)
        if end.is_set():
            return ""
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as opened:
        while n := opened.readinto(buffer):
            yield buffer[:n]
