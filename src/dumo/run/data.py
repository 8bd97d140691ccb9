"""Whether the data of a run are what it was trained on, and what its run.yaml records of them.

- `resolved.data` in run.yaml has the standard deviation and the fingerprint of the data: `recorded_facts`,
  `with_data_facts`.
- `images.ledger` has what the images were when they were read (`dumo.data.ledger`). `compare_data` compares with it
  when a run resumes, `begin_ledger` makes it ready for what is read next, and `save_ledger` adds to it before a
  checkpoint.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from dumo.config.place import RUN_FILE
from dumo.config.source import DATA_KEY
from dumo.config.spec import Run
from dumo.data import Data, Latents
from dumo.data import ledger as ledgers
from dumo.data.ledger import Ledger, Recorded, ledger_of
from dumo.io import digest
from dumo.io import file as files
from dumo.io.data_source import DataSource
from dumo.training import agreement
from dumo.training.checkpoint import Checkpoint, FileEntry
from dumo.types import UserError

# The rows that are measured: the first of the first epoch in the order of seed 0.
ROWS = 256
_FIX = "give another folder with --out, or begin a new run with the data as they are by --from STEP --out NEW"
_PROBLEM = f"is not what it was when this run read it: put it back as it was, on all ranks alike, {_FIX}"


class DataFacts(BaseModel):
    """What run.yaml records of a run's data."""

    # The standard deviation over all numbers of the first ROWS rows, EDM's sigma_data.
    sd: float
    # Of the source; None if it has none.
    fingerprint: str | None = None


def recorded_facts(run: Run) -> DataFacts | None:
    """What a run.yaml records of the data of its run; None before training begins."""
    facts = run.resolved.get(DATA_KEY)
    return None if facts is None else DataFacts.model_validate(facts)


def require_same_fingerprint(recorded: Run, source: DataSource, folder: Path) -> None:
    """Raise UserError if the data have another fingerprint than those that a run was trained on."""
    facts = recorded_facts(recorded)
    fingerprint = source.fingerprint()
    if facts and facts.fingerprint not in (None, fingerprint):
        raise changed_data_error(folder, f"fingerprint {facts.fingerprint} in {RUN_FILE}, {fingerprint} now")


def with_data_facts(run: Run, recorded: Run | None, source: DataSource) -> Run:
    """The run with what is recorded of its data, or with what they are now. One process calls it."""
    facts = recorded_facts(recorded) if recorded else None
    if facts is None:
        facts = DataFacts(sd=measure(source), fingerprint=source.fingerprint())
    return run.model_copy(update={"resolved": run.resolved | {DATA_KEY: facts.model_dump()}})


def measure(source: DataSource) -> float:
    """The standard deviation over all numbers of the first ROWS rows, EDM's sigma_data."""
    x, _ = source.batch(0, ROWS, 0)
    return x.double().std().item()


def compare_data(data: Data, source: object, folder: Path, last: Checkpoint | None) -> None:
    """Compare the data, opened as `source`, with those that the checkpoint `last` of a run was trained on.

    1. Compare a cache of latents with the images that it was made of.
    2. Compare names and classes with those of the checkpoint.
    3. Hash images of another size or time than they had, and compare them. All others are compared when they are read.

    Every rank must call it; the ranks of a machine share the hashing. Raises UserError on every rank, with the names,
    if there is a difference.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if isinstance(data, Latents):
        agreement.gather_results(lambda: None if local_rank else data.compare_images(), is_long=True)
    ledger = ledger_of(source)
    if ledger is None or last is None or last.facts.ledger is None:
        return
    recorded = agreement.on_each_rank(lambda: read_ledger(folder, last))
    problem = ledger.difference(recorded)
    if not problem:
        ledger.expect(recorded.records, _PROBLEM)
        suspects = ledger.suspects()
        agreement.gather_results(lambda: ledger.hash(suspects[local_rank::local_ranks]), is_long=True)
        changed = np.unique(np.concatenate(agreement.gather_results(ledger.changed)))
        if len(changed):
            problem = f"{ledger.changed_text(changed)} changed"
    if problem:
        raise changed_data_error(folder, problem)


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
    entry = last.facts.ledger
    assert entry is not None, "the run is of images"
    file = folder / ledgers.FILE
    recorded = ledgers.read(file, entry.bytes)
    with file.open("rb") as opened:
        content = opened.read(entry.bytes)
    if digest.of_bytes(content) != entry.sha256:
        raise UserError(f"{file} has changed, which holds what the images were: bring it back, or {_FIX}")
    return recorded


def begin_ledger(folder: Path, source: object, last: Checkpoint | None) -> None:
    """Bring the file of what the images were to a checkpoint, or begin it. For one process."""
    ledger = ledger_of(source)
    if ledger is None:
        return
    file = folder / ledgers.FILE
    entry = last.facts.ledger if last else None
    ledgers.truncate(file, entry.bytes if entry else 0)
    if entry is None:
        ledgers.start(file, ledger)


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
        ledger.expect_more(merged, _PROBLEM)
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
