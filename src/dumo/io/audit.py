"""Whether the shards of a table still hold what was written: each is compared with its SHA-256 once.

A GB takes about a second, so a small table is read through when it is opened. A larger one is read through by a thread
while training begins, and a fault is raised with the next batch: the steps until then are lost, but a table of
terabytes keeps nobody waiting. A shard that is whole is noted with its size and the time of its last change, and read
again only where these differ: so the next start reads nothing. Ranks of one machine share the work.

A number that changes on a disk without a new time, after it was noted, is not noticed.
"""

import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

from dumo.io import file as files
from dumo.io import note
from dumo.io.table import REMAKE, Shard
from dumo.runtime import signals
from dumo.runtime.progress import late
from dumo.types import UserError

NAME = ".dumo-checked.safetensors"
SOON = 2 * 10**9  # bytes that are read through before the first batch: ours
PIECE = 2**22  # bytes read at a time
NOTED = 30.0  # seconds between two notes

State = list[int | str]  # size, time of the last change in ns, SHA-256


@dataclass
class Found:
    """What was found so far, and whether to go on looking."""

    fault: str = ""
    end: Event = field(default_factory=Event)


class Audit:
    """Raises UserError for a shard that has changed: when it is made, or from `require`, once that is known."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Begin; at most `SOON` bytes are done at once."""
        self.found, known = Found(), _known(folder)
        rank, ranks = (int(os.environ.get(name, one)) for name, one in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        todo = [shard for shard in shards[rank::ranks] if known.get(shard.file) != _state(folder, shard)]
        self.thread: Thread | None = None
        if sum(shard.size for shard in todo) <= SOON:
            with late("comparing the cache with its checksums", len(todo)) as tick:
                _look(folder, todo, self.found, lambda done: (signals.check(), tick(done, "")))
            self.require()
            return
        self.thread = Thread(target=_look, args=(folder, todo, self.found), name="audit", daemon=True)
        self.thread.start()
        weakref.finalize(self, self.found.end.set)  # the thread ends with the table

    def require(self) -> None:
        """Raise UserError if a shard was found that has changed."""
        if self.found.fault:
            raise UserError(self.found.fault)


def _look(
    folder: Path, shards: Sequence[Shard], found: Found, tick: Callable[[int], object] = lambda done: None
) -> None:
    """Compare shard by shard, and note which are whole, until one is not."""
    whole: dict[str, State] = {}
    noted = time.monotonic()
    try:
        for k, shard in enumerate(shards, 1):
            before = _state(folder, shard)
            checksum = _sha256(folder / shard.file, found.end)
            if found.end.is_set():
                return
            if checksum != shard.sha256:
                what = checksum if " " in checksum else "has changed: its SHA-256 is another"
                found.fault = f"{folder}: {shard.file} {what}: {REMAKE}"
                return
            whole[shard.file] = before
            if time.monotonic() > noted + NOTED:
                whole, noted = _note(folder, whole), time.monotonic()
            tick(k)
    finally:
        _note(folder, whole)


def _sha256(file: Path, end: Event) -> str:
    """Of a file, unless the end comes first; what is wrong with one that cannot be read."""
    found = hashlib.sha256()
    try:
        for piece in _pieces(file):
            found.update(piece)
            if end.is_set():
                return ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return found.hexdigest()


def _pieces(file: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as opened:
        while n := opened.readinto(buffer):
            yield buffer[:n]


def _state(folder: Path, shard: Shard) -> State:
    """By what a shard that was found whole is known again."""
    try:
        about = (folder / shard.file).stat()
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns, shard.sha256]


def _known(folder: Path) -> dict[str, object]:
    """The states of the shards that were found whole, by all notes there are."""
    known: dict[str, object] = {}
    for place in files.places(folder, NAME):
        if found := note.read(place):
            known |= json.loads(found[1])
    return known


def _note(folder: Path, whole: dict[str, State]) -> dict[str, State]:
    """Note shards that were found whole, with those that others noted; where that is not allowed, do not."""
    place = note.best(files.places(folder, NAME))
    if whole and place:
        try:
            with note.held(place):
                note.write(place, {}, json.dumps(_known(folder) | whole))
        except OSError:
            pass
    return {}
