"""A run's folder while it is trained: locked, refused if it holds another run, guarded, and marked.

`locked_run_folder` keeps other trainings out, `require_resumable` refuses another run, `remove_half_written` cleans up
after a kill, and `guard_run_folder` refuses writes once the folder was moved. `run.job` calls them in this order.
`run.history` calls `set_best_aside`, `write_run_file` and one of `mark_no_checkpoint_yet` and
`mark_checkpoint_written` before the first step; the journal marks each checkpoint that it has written.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from dumo.config.load import RUN_FILE, dump
from dumo.config.place import LOG_FILE
from dumo.config.source import RecordedChange
from dumo.config.spec import Run
from dumo.io import file as files
from dumo.io.guard import guard_path, locked, require_in_place
from dumo.run.index import Index
from dumo.run.provenance import require_same_run
from dumo.training import manifest
from dumo.types import UserError

# Exists, and is locked, while a process trains in the folder.
LOCK_FILE = ".training.lock"
# The last request that must be carried out only once (`dumo.run.request`).
OBEYED_FILE = ".obeyed"
# An empty file: a checkpoint was written. If the folder has none now, it was lost.
CHECKPOINT_MARK = ".saved"
# The weights with the best validation score.
BEST_FOLDER = "best"
# Files that training writes at the top of the folder.
_WRITTEN_FILES = (RUN_FILE, "data.json", LOG_FILE, OBEYED_FILE)


@contextmanager
def locked_run_folder(folder: Path) -> Generator[None, None, None]:
    """Create a run's folder if it is missing, and keep every other training out of it.

    A folder that was created and is empty at the end is removed. Raises UserError if another process trains there, and,
    before anything is written, if the folder holds files that are not a run's (`require_free`).
    """
    require_free(folder)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        problem = f"{folder} is being trained by another process: wait for it, or give another folder with --out"
        with locked(folder / LOCK_FILE, problem):
            yield
    finally:
        # A folder that something was written to is not empty, and stays.
        with suppress(OSError):
            for new_folder in new_folders:
                new_folder.rmdir()


def require_free(folder: Path) -> None:
    """Raise UserError for a folder of files that are not a run's. What a killed training left does not count."""
    if (folder / RUN_FILE).exists() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name != LOCK_FILE and not _is_half_written(path):
            raise UserError(f"{folder} is not empty and holds no {RUN_FILE}: give another folder with --out")


def require_resumable(run: Run, index: Index, step: int | None = None, *, accept: bool = False) -> None:
    """Raise UserError unless `run` can be trained in its folder, from the start or from a checkpoint there.

    - `index`: what the folder holds.
    - `step`: the step of the checkpoint to resume from; None takes the last checkpoint.
    - `accept`: fields may differ from those of the folder's run.

    Refused are a step without a checkpoint, lost checkpoints, and another run.
    """
    folder = index.folder
    checkpoints = index.checkpoints.by_step()
    if step is not None and step not in checkpoints:
        existing = ", ".join(map(str, checkpoints)) or "none"
        raise UserError(f"--from {step}: {folder} has no checkpoint of that step; its checkpoints: {existing}")
    if index.exported_weights and not checkpoints:
        raise UserError(
            f"{folder} is an export, which has no optimizer state to resume from: begin a new run from its weights "
            f"with start.source={folder}"
        )
    # If the log is gone, too, the user has cleared the run, and it may begin anew.
    was_saved = (folder / LOG_FILE).exists() and (folder / CHECKPOINT_MARK).exists()
    if index.recorded_run and not checkpoints and was_saved:
        raise UserError(
            f"{folder} had checkpoints, and {index.checkpoints.folder} has none: mount its disk or restore them; to "
            "train from the start, give another folder with --out"
        )
    require_same_run(index, run, step, accept=accept)


def remove_half_written(folder: Path) -> None:
    """Remove what a killed training left half-written. The folder must be locked by the caller."""
    half_written = [path for path in folder.iterdir() if _is_half_written(path)]
    for place in manifest.weight_folders(folder):
        half_written += place.glob(".step-*.tmp")
    for path in half_written:
        files.remove(path)


def _is_half_written(path: Path) -> bool:
    """Whether a path at the top of a run's folder is a file that a killed training left half-written."""
    prefixes = tuple(f".{name}." for name in _WRITTEN_FILES)
    return path.name.startswith(prefixes) and not path.is_dir()


@contextmanager
def guard_run_folder(folder: Path) -> Generator[None, None, None]:
    """Refuse writes into a run's folder, and its folders on other disks, once it was moved or unmounted.

    Raises UserError if such a write was tried.
    """
    guarded = [folder]
    for place in manifest.weight_folders(folder):
        if is_on_other_disk(place, folder):
            guarded.append(place)
    with ExitStack() as stack:
        for path in guarded:
            stack.enter_context(guard_path(path))
        try:
            yield
        except (OSError, SafetensorError):
            # The write may have failed because a folder disappeared meanwhile.
            for path in guarded:
                require_in_place(path)
            raise


def is_on_other_disk(place: Path, folder: Path) -> bool:
    """Whether `place`, a folder in a run's folder, is on another disk than `folder`, through a link or a mount."""
    return place.is_dir() and place.stat().st_dev != folder.stat().st_dev


def set_best_aside(folder: Path) -> Path | None:
    """Move best/*.safetensors to best/cut-N, with the first free N, when a run restarts from step 0.

    Returns best/cut-N, or None if there were no best weights.
    """
    best_folder = folder / BEST_FOLDER
    weights_by_step = manifest.paths_by_step(best_folder, ".safetensors")
    if not weights_by_step:
        return None
    number = 1
    while (best_folder / f"cut-{number}").exists():
        number += 1
    cut_folder = best_folder / f"cut-{number}"
    cut_folder.mkdir()
    for file in weights_by_step.values():
        file.rename(cut_folder / file.name)
    return cut_folder


def write_run_file(run: Run, folder: Path, changed: Sequence[RecordedChange] = ()) -> None:
    """Write a run's run.yaml, with the changes of its fields while it trained, and wait until it is on the disk."""
    files.write(folder / RUN_FILE, dump(run, changed).encode(), durable=True)


def mark_no_checkpoint_yet(folder: Path) -> None:
    """Remove, before the first step, the mark of a run whose log and checkpoints were removed."""
    (folder / CHECKPOINT_MARK).unlink(missing_ok=True)


def mark_checkpoint_written(folder: Path) -> None:
    """Mark that the run has a checkpoint: from now on one that is not there was lost.

    Raises UserError if the folder is no longer in its place (`require_in_place`).
    """
    mark = folder / CHECKPOINT_MARK
    require_in_place(mark)
    if not mark.exists():
        mark.touch()
        files.flush(folder)
