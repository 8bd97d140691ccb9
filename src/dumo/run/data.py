"""Whether the data of a run are what it was trained on, and what its folder notes of them.

- `data.json` has the standard deviation and the fingerprint of the data: `read_note`, `update_note`.
- `images.ledger` has what the images were when they were read (`dumo.data.ledger`). `compare_data` compares with it
  when a run resumes, `begin_ledger` makes it ready for what is read next, and `save_ledger` adds to it before a
  checkpoint.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dumo.data import Data, Latents
from dumo.data import ledger as ledgers
from dumo.data.ledger import Ledger, Recorded, ledger_of
from dumo.io import digest
from dumo.io import file as files
from dumo.io.read import read_json, write_json
from dumo.io.source import DataSource
from dumo.training import agreement
from dumo.training.manifest import Checkpoint, FileEntry
from dumo.types import UserError

NOTE_FILE = "data.json"
ROWS = 256  # that are measured, the first of the first epoch in the order of seed 0
_FIX = "give another folder with --out, or resume with the data as they are by --accept"
_PROBLEM = f"is not what it was when this run read it: put it back as it was, on all ranks alike, {_FIX}"


@dataclass(frozen=True)
class DataNote:
    """What data.json says."""

    sd: float | None  # the standard deviation over all numbers of the first `rows`, EDM's sigma_data; None: unknown
    fingerprint: str | None = None  # of the source, if it has one
    rows: int = ROWS


@dataclass(frozen=True)
class Change:
    """How data have changed, for the note in run.yaml: a digest of them before and now."""

    was: str
    now: str


def read_note(folder: Path) -> DataNote | None:
    """What data.json says; None: there is none."""
    file = folder / NOTE_FILE
    if not file.exists():
        return None
    content = read_json(file)
    return DataNote(content["sd"], content.get("fingerprint"), content.get("rows", ROWS))


def update_note(
    folder: Path, before: DataNote | None, source: DataSource, fingerprint: str | None, *, anew: bool
) -> DataNote:
    """The note of the data in `source`, written to data.json if it is new. Only one process may call this.

    `before` is the note that is there. The standard deviation is measured again with `anew`, or if the source has
    another fingerprint.
    """
    is_same = before is not None and before.fingerprint in (None, fingerprint)
    if before is not None and before.sd is not None and not anew and (is_same or fingerprint is None):
        note = DataNote(before.sd, fingerprint or before.fingerprint, before.rows)
    else:
        note = DataNote(measure(source), fingerprint)
    if note != before:
        content: dict[str, object] = {"sd": note.sd, "rows": note.rows}
        if note.fingerprint is not None:
            content["fingerprint"] = note.fingerprint
        write_json(folder / NOTE_FILE, content)
    return note


def measure(source: DataSource) -> float:
    """The standard deviation over all numbers of the first ROWS rows, EDM's sigma_data."""
    x, _ = source.batch(0, ROWS, 0)
    return x.double().std().item()


def compare_data(data: Data, source: object, folder: Path, last: Checkpoint | None, *, accept: bool) -> Change | None:
    """Compare the data, opened as `source`, with those that the checkpoint `last` of a run was trained on.

    1. Compare a cache of latents with the images that it was made of.
    2. Compare names and classes with those of the checkpoint.
    3. Hash images of another size or time than they had, and compare them. All others are compared when they are read.

    With `accept`, the data are taken as they are. Every rank must call it; the ranks of a machine share the hashing.
    Returns the change if there is one and it is accepted. Raises UserError on every rank, with the names, if there is
    one that is not.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if isinstance(data, Latents):
        agreement.gather_results(lambda: None if local_rank else data.compare_images(), is_long=True)
    ledger = ledger_of(source)
    if ledger is None or last is None or last.manifest.ledger is None:
        return None

    # What the images were.
    recorded: Recorded | None = None
    problem = ""
    try:
        recorded = agreement.on_each_rank(lambda: read_ledger(folder, last))
        problem = ledger.difference(recorded)
    except UserError as error:
        if not accept:
            raise
        problem = str(error)

    # What they are.
    if recorded and not problem:
        ledger.expect(recorded.records, _PROBLEM)
        suspects = ledger.suspects()
        agreement.gather_results(lambda: ledger.hash(suspects[local_rank::local_ranks]), is_long=True)
        changed = np.unique(np.concatenate(agreement.gather_results(ledger.changed)))
        if len(changed):
            problem = f"{ledger.changed_text(changed)} changed"
    if not problem:
        return None
    if not accept:
        raise changed_data_error(folder, problem)
    ledger.expect_nothing()
    was = digest.of_bytes(recorded.names, recorded.records.tobytes())[:16] if recorded else ""
    return Change(was, ledger.fingerprint())


def changed_data_error(folder: Path, problem: str) -> UserError:
    """The error that the data of a run have changed."""
    return UserError(
        f"{folder}: the data are not those that it was trained on ({problem}): put them back as they were, {_FIX}"
    )


def require_images(folder: Path, ledger: Ledger, last: Checkpoint) -> None:
    """Hash all images, and raise UserError, with names, if they are others than a checkpoint was trained on."""
    recorded = read_ledger(folder, last)
    problem = ledger.difference(recorded)
    if not problem:
        ledger.expect(recorded.records, _PROBLEM)
        ledger.hash(range(len(ledger)))
        changed = ledger.changed()
        if len(changed):
            problem = f"{ledger.changed_text(changed)} changed"
    if problem:
        raise changed_data_error(folder, problem)


def read_ledger(folder: Path, last: Checkpoint) -> Recorded:
    """What the images were up to a checkpoint. Raises UserError if the run's file is not as the checkpoint lists it."""
    entry = last.manifest.ledger
    assert entry is not None, "the run is of images"
    file = folder / ledgers.FILE
    recorded = ledgers.read(file, entry.bytes)
    with file.open("rb") as opened:
        content = opened.read(entry.bytes)
    if digest.of_bytes(content) != entry.sha256:
        raise UserError(f"{file} has changed, which holds what the images were: bring it back, or {_FIX}")
    return recorded


def begin_ledger(folder: Path, source: object, last: Checkpoint | None, *, anew: bool) -> None:
    """Bring the file of what the images were to a checkpoint; begin it, or with `anew` its records. For one process."""
    ledger = ledger_of(source)
    if ledger is None:
        return
    file = folder / ledgers.FILE
    entry = last.manifest.ledger if last else None
    ledgers.truncate(file, entry.bytes if entry else 0)
    if entry is None or anew:
        ledgers.begin(file, ledger)


def save_ledger(folder: Path, ledger: Ledger | None) -> FileEntry | None:
    """Add the images that any rank has read to the run's file. Returns what a checkpoint lists of it.

    Every rank must call it. Raises UserError, on all ranks, if two ranks have read other contents of one image.
    """
    if ledger is None:
        return None
    of_ranks = agreement.gather_results(ledger.take_new)
    merged = of_ranks[0]
    if len(of_ranks) > 1:
        merged = agreement.on_each_rank(lambda: _merge(ledger, of_ranks))
        ledger.learn(merged, _PROBLEM)
    file = folder / ledgers.FILE

    def append() -> FileEntry:
        ledgers.append(file, merged)
        files.flush(file)
        return FileEntry.of(file)

    return agreement.on_main_rank(append)


def _merge(ledger: Ledger, of_ranks: list[NDArray[np.void]]) -> NDArray[np.void]:
    """The records of all ranks, one of each image. Raises UserError if two of an image have other hashes."""
    records = np.concatenate(of_ranks)
    records = records[np.argsort(records["image"], kind="stable")]
    is_same_image = records["image"][1:] == records["image"][:-1]
    is_other = is_same_image & (records["sha256"][1:] != records["sha256"][:-1]).any(1)
    if is_other.any():
        image = int(records["image"][1:][is_other][0])
        raise UserError(f"{ledger.rows.path(image)} is another on another rank: give all ranks the same files")
    is_first = np.concatenate(([True] * min(1, len(records)), ~is_same_image))
    return records[is_first]
