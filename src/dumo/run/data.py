"""Record the data of a run, and check that they have not changed when it resumes.

- `resolved.data` in run.yaml contains the standard deviation and the fingerprint of the data: `recorded_facts`,
  `with_data_facts`.
- `images.ledger` contains hashes of the images at the time they were read (`dumo.data.ledger`). `compare_data` compares
  them when a run resumes, `begin_ledger` prepares the file for new records, and `save_ledger` appends to it before a
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

# The number of rows that are measured: the first of the first epoch in the order of seed 0.
ROWS = 256
_FIX = "use another folder with --out, or start a new run on the current data with --from STEP --out NEW"
_PROBLEM = f"has changed since this run first read it: restore it on all ranks, {_FIX}"


class DataFacts(BaseModel):
    """The measurements of a run's data in run.yaml."""

    # The standard deviation over all numbers of the first ROWS rows, EDM's sigma_data.
    sd: float
    # The fingerprint of the source; None if it has none.
    fingerprint: str | None = None


def recorded_facts(run: Run) -> DataFacts | None:
    """Return the recorded measurements of a run's data; None before training begins."""
    facts = run.resolved.get(DATA_KEY)
    return None if facts is None else DataFacts.model_validate(facts)


def require_same_fingerprint(recorded: Run, source: DataSource, folder: Path) -> None:
    """Raise UserError if the fingerprint of the data differs from the recorded one."""
    facts = recorded_facts(recorded)
    fingerprint = source.fingerprint()
    if facts and facts.fingerprint not in (None, fingerprint):
        raise changed_data_error(folder, f"fingerprint {facts.fingerprint} in {RUN_FILE}, {fingerprint} now")


def with_data_facts(run: Run, recorded: Run | None, source: DataSource) -> Run:
    """Return the run with recorded or else new measurements of its data. Only one process calls it."""
    facts = recorded_facts(recorded) if recorded else None
    if facts is None:
        facts = DataFacts(sd=measure(source), fingerprint=source.fingerprint())
    return run.model_copy(update={"resolved": run.resolved | {DATA_KEY: facts.model_dump()}})


def measure(source: DataSource) -> float:
    """Return the standard deviation over all numbers of the first ROWS rows, EDM's sigma_data."""
    x, _ = source.batch(0, ROWS, 0)
    return x.double().std().item()


def compare_data(data: Data, source: object, folder: Path, last: Checkpoint | None) -> None:
    """Compare the data, opened as `source`, with the data of the checkpoint `last`.

    1. Compare a cache of latents with its source images.
    2. Compare names and classes with those of the checkpoint.
    3. Hash and compare images with a changed size or modification time. Other images are compared when they are read.

    Every rank must call it; the ranks of a machine share the hashing. Raise UserError on every rank if the data differ,
    with the names of changed images.
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
    """Return the error for changed data."""
    return UserError(f"{folder}: the data differ from those the run was trained on ({problem}): restore them, {_FIX}")


def require_images(folder: Path, ledger: Ledger, last: Checkpoint) -> None:
    """Hash all images, and raise UserError with the names of those that have changed since a checkpoint."""
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
    """Read the ledger of images up to a checkpoint. Raise UserError if the file does not match the checkpoint."""
    entry = last.facts.ledger
    assert entry is not None, "the run is of images"
    file = folder / ledgers.FILE
    recorded = ledgers.read(file, entry.bytes)
    with file.open("rb") as opened:
        content = opened.read(entry.bytes)
    if digest.of_bytes(content) != entry.sha256:
        raise UserError(f"{file} has changed, and it records the run's images: restore it, or {_FIX}")
    return recorded


def begin_ledger(folder: Path, source: object, last: Checkpoint | None) -> None:
    """Truncate the ledger file to a checkpoint, or create it. Only one process calls it."""
    ledger = ledger_of(source)
    if ledger is None:
        return
    file = folder / ledgers.FILE
    entry = last.facts.ledger if last else None
    ledgers.truncate(file, entry.bytes if entry else 0)
    if entry is None:
        ledgers.start(file, ledger)


def save_ledger(folder: Path, ledger: Ledger | None) -> FileEntry | None:
    """Append the images that any rank has read to the ledger file. Return its entry for the checkpoint.

    Every rank must call it. Raise UserError on all ranks if two ranks have read different contents of an image.
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
    """Merge the records of all ranks, one per image. Raise UserError if the hashes of an image differ."""
    records = np.concatenate(of_ranks)
    records = records[np.argsort(records["image"], kind="stable")]
    is_same_image = records["image"][1:] == records["image"][:-1]
    is_other = is_same_image & (records["sha256"][1:] != records["sha256"][:-1]).any(1)
    if is_other.any():
        image = int(records["image"][1:][is_other][0])
        raise UserError(f"{ledger.rows.path(image)} differs between ranks: give all ranks the same files")
    is_first = np.concatenate(([True] * min(1, len(records)), ~is_same_image))
    return records[is_first]
