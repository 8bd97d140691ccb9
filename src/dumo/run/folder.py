"""A run's folder while it is trained: locked, refused where it holds another run, guarded, and marked.

`run.job` calls, in this order, `locked_run_folder`, `require_resumable`, `remove_half_written` and `guard_run_folder`.
The journal then calls `set_best_aside`, `write_run_file` and `mark_no_checkpoint_yet`; at each checkpoint
`restore_run_file` and `mark_checkpoint_written`.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from dumo.config.load import RUN_FILE, dump
from dumo.config.place import LOG_FILE
from dumo.config.source import Noted
from dumo.config.spec import Run
from dumo.io import file as files
from dumo.run.index import Index
from dumo.run.provenance import require_same_run
from dumo.runtime.door import option
from dumo.training import manifest
from dumo.training.log import read_log
from dumo.training.spec import Train
from dumo.types import UserError

LOCK = ".training.lock"  # a file that is held, and there, while the run is trained
NO_CHECKPOINT_YET = ".unsaved"  # empty file: from before the first step until the first checkpoint is written
CHECKPOINT_WRITTEN = ".saved"  # the same file from then on, renamed: a run without a checkpoint has lost it
BEST = "best"  # a folder in it: the weights of the best score
WRITTEN_FILES = (RUN_FILE, "data.json", LOG_FILE)  # by training, at the top of the folder


def _require_name(folder: Path) -> None:
    """Raise UserError where a folder's name is no text in UTF-8: no file of weights opens there."""
    if not str(folder).isascii() and str(folder) != str(folder).encode(errors="replace").decode():
        raise UserError(
            f"{folder} is no name in UTF-8, and no file of weights opens there: give another with {option('out')}"
        )


def require_free(folder: Path) -> None:
    """Raise UserError where a folder without a run.yaml is not empty, or is no folder."""
    if (folder / RUN_FILE).exists():
        return
    if manifest.paths_by_step(folder / "checkpoints"):
        raise UserError(
            f"{folder / RUN_FILE} was removed: restore it (each checkpoint that is left holds a copy, "
            f"checkpoints/step-*/{manifest.RUN}), then start again; or give another folder with {option('out')}"
        )
    if folder.is_dir() and any(path.name != LOCK and not _is_half_written(path) for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {RUN_FILE}: give another folder with {option('out')}")


def require_resumable(run: Run, index: Index, step: int | None = None, *, accept: bool = False) -> None:
    """Raise UserError unless the folder is free, or holds this run with no more steps behind it than it is to make.

    `step` is that of the checkpoint to resume from; None: of the last one. `accept`: fields may differ.
    """
    folder = index.folder
    checkpoints = index.checkpoints.by_step()
    if step is not None and step not in checkpoints:
        problem = f"{option('from', step)}: {folder} has no checkpoint of that step"
        if not checkpoints:
            raise UserError(f"{problem}: it has none")
        raise UserError(f"{problem}: it has those of step {', '.join(map(str, checkpoints))}")
    steps_done = max(checkpoints, default=0) if step is None else step
    if steps_done > run.train.steps and run.train.minutes is None:
        raise UserError(
            f"train.steps={run.train.steps}, but {folder} has already trained {steps_done} steps: set train.steps to "
            f"{steps_done} or more"
        )
    if index.written and not checkpoints:
        _require_no_lost_checkpoint(folder, index.written.run.train)
    require_same_run(index, run, step, accept=accept)


def _require_no_lost_checkpoint(folder: Path, train: Train) -> None:
    """Raise UserError where a run's checkpoints were lost, rather than train it anew.

    The folder's mark says whether one was written; where the log is gone, too, somebody has cleared the run. Of a run
    from before there were marks, the log says so where it goes on after the first step that is saved by its number.
    """
    log_file = folder / LOG_FILE
    if not log_file.exists():
        return
    if (folder / CHECKPOINT_WRITTEN).exists():
        raise UserError(
            f"{folder} had checkpoints, and {folder / 'checkpoints'} has none: bring back what it was on. To train "
            f"from the start give another folder with {option('out')}, or move {folder} away"
        )
    if (folder / NO_CHECKPOINT_YET).exists():
        return
    last_step = max((row["step"] for row in read_log(log_file)), default=0)
    if last_step > train.first_saved_step:  # that one is saved once the slope has been examined on it
        raise UserError(
            f"{log_file} reaches step {last_step}, and {folder / 'checkpoints'} has no checkpoint: bring back what it "
            f"was on. To train from the start give another folder with {option('out')}, or move {log_file} away"
        )


def _is_half_written(path: Path) -> bool:
    """Whether a file of a run's folder is what a training that was killed left half-written."""
    prefixes = tuple(f".{name}." for name in WRITTEN_FILES)
    return path.name.startswith(prefixes) and not path.is_dir()


def remove_half_written(folder: Path) -> None:
    """Remove what a training that was killed left half-written. The folder must be held."""
    half_written = [path for path in folder.iterdir() if _is_half_written(path)]
    for place in manifest.places(folder):
        half_written += place.glob(".step-*.tmp")
    for path in half_written:
        files.remove(path)


@contextmanager
def locked_run_folder(folder: Path) -> Generator[None, None, None]:
    """Keep every other training out of a run's folder; folders made for nothing are removed at the end.

    Raises UserError where another process is training there, and, with nothing written, where it holds something else.
    """
    _require_name(folder)
    require_free(folder)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        problem = f"{folder} is being trained by another process: wait for it, or give {option('out')}"
        with files.locked(folder / LOCK, problem):
            yield
    finally:
        with suppress(OSError):  # it is not empty: something was written
            for new_folder in new_folders:
                new_folder.rmdir()


@contextmanager
def guard_run_folder(folder: Path) -> Generator[None, None, None]:
    """While inside, refuse writes into a run's folder, or to its other disks, that was removed, renamed or unmounted.

    Raises UserError where that was tried.
    """
    guarded = [folder, *(place for place in manifest.places(folder) if is_on_other_disk(place, folder))]
    with ExitStack() as stack:
        for place in guarded:
            stack.enter_context(files.guard_path(place))
        try:
            yield
        except (OSError, SafetensorError):
            for place in guarded:  # one may have gone while a file was written, which is why that failed
                files.require_in_place(place)
            raise


def is_on_other_disk(place: Path, folder: Path) -> bool:
    """Whether a place of a run is a folder on another disk than the run's folder, by a link or a mount."""
    return place.is_dir() and place.stat().st_dev != folder.stat().st_dev


def restore_run_file(folder: Path, text: str) -> bool:
    """Write run.yaml again where it was removed during training, and return whether it was.

    Raises UserError where the run's folder is no longer in its place (`files.require_in_place`).
    """
    file = folder / RUN_FILE
    files.require_in_place(file)
    if file.is_file():
        return False
    files.write(file, text.encode(), durable=True)
    return True


def mark_no_checkpoint_yet(folder: Path) -> None:
    """Write down, before the first step, that the run has no checkpoint yet."""
    mark = folder / NO_CHECKPOINT_YET
    files.require_in_place(mark)
    mark.touch()
    files.flush(folder)


def mark_checkpoint_written(folder: Path) -> None:
    """Write down that the run has a checkpoint: from now on one that is not there was lost."""
    mark_before = folder / NO_CHECKPOINT_YET
    mark = folder / CHECKPOINT_WRITTEN
    files.require_in_place(mark)
    if mark_before.exists():
        mark_before.replace(mark)
    elif mark.exists():
        return
    else:  # of a run from before there were marks
        mark.touch()
    files.flush(folder)


def write_run_file(run: Run, folder: Path, changed: Sequence[Noted] = ()) -> None:
    """Write run.yaml, complete, with what was changed in it, and flush it to the disk."""
    files.write(folder / RUN_FILE, dump(run, changed).encode(), durable=True)


def set_best_aside(run: Path) -> Path | None:
    """Move the best weights of a run that starts again into a folder of their own; None: there are none.

    The folder is best/cut-N, on the same disk, with a number of its own.
    """
    weights = manifest.paths_by_step(run / BEST, ".safetensors")
    if not weights:
        return None
    number = 1
    while (run / BEST / f"cut-{number}").exists():
        number += 1
    aside = run / BEST / f"cut-{number}"
    aside.mkdir()
    for file in weights.values():
        file.rename(aside / file.name)
    return aside
