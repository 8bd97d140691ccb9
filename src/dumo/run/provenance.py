"""Whether a folder's run.yaml, its weights and the run that is asked for are one run.

A checkpoint has the run as it was up to its step, with what had changed by then; run.yaml may have been edited since. A
field that makes another function, training or sample must be the same in both, or be noted as changed at that step or
later. Files of weights alone have a hash of those fields of their run that may not change
(`dumo.config.difference.identity`).

Training calls `require_same_run` before it resumes, and `run_before_step` for what has changed since. Who reads a run's
weights calls `require_own_checkpoint` or `require_own_weights`, and `require_own_file` for a file of weights alone that
the run wrote into its folder.
"""

from collections.abc import Set
from contextlib import suppress
from pathlib import Path

from dumo.config.code import require_same_code
from dumo.config.difference import differences, identity
from dumo.config.history import RecordedRun
from dumo.config.source import RUN_FILE
from dumo.config.spec import Run
from dumo.run.index import CheckpointRun, Index, later_changes_of_function
from dumo.runtime import shell_path
from dumo.training import manifest
from dumo.training.checkpoint import facts_of, step_of
from dumo.training.manifest import Checkpoint
from dumo.types import UserError


def require_own_checkpoint(run: Run, index: Index, checkpoint: Checkpoint, place: Path) -> None:
    """Raise UserError where the run of a checkpoint is not the one that run.yaml says.

    `run` is the run that is opened, `place` the part of the checkpoint that is shown.
    """
    trained_run = index.checkpoint_run(checkpoint)
    recorded_run = RecordedRun(run, index.past)
    lines = trained_run.lines(trained_run.differences_from(recorded_run), recorded_run)
    _require_no_differences(index.folder, place, lines)
    require_same_code(run, trained_run.run.resolved, index.folder)


def require_own_weights(run: Run, index: Index, place: Path) -> None:
    """Raise UserError where weights, as a milestone or a part of another folder's checkpoint, are of another run."""
    checkpoint = _checkpoint_of(place)
    if checkpoint and checkpoint.path.resolve().parent == index.checkpoints.folder.resolve():
        require_own_checkpoint(run, index, checkpoint, place)
        return
    recorded_run = RecordedRun(run, index.past)
    trained_run = CheckpointRun.read(checkpoint) if checkpoint else None
    owner = identity(trained_run.run) if trained_run else facts_of(place).get("run")
    if owner is not None and owner not in recorded_run.identities():
        raise UserError(f"{place} has weights of another run than {index.folder}: take others, or that run's folder")
    changes = later_changes_of_function(recorded_run.past, step_of(place, run.train.steps))
    _require_no_differences(index.folder, place, [str(change) for change in changes])
    if trained_run:
        require_same_code(run, trained_run.run.resolved, index.folder)


def _checkpoint_of(place: Path) -> Checkpoint | None:
    """The checkpoint that a file or a folder is, or is a part of; None: it lies in none."""
    for folder in (place, place.parent):
        if (folder / manifest.NAME).is_file():
            return Checkpoint(folder)
    return None


def _require_no_differences(folder: Path, place: Path, lines: list[str]) -> None:
    """Raise UserError with these lines, if there are any, of how run.yaml is not the run that weights are of."""
    if not lines:
        return
    differences_text = "\n  ".join([f"{folder / RUN_FILE} is not the run that {place} was trained by:", *lines])
    raise UserError(
        f"{differences_text}\nPut these fields back. To train on with them as they are:  "
        f"dumo train {shell_path(folder)} --accept"
    )


def require_own_file(file: Path, identities: Set[str], kind: str, step: int, **facts: object) -> None:
    """Raise UserError where a file of weights alone is of another run, or is not what its place in the folder says.

    `identities` are those of the run (`RecordedRun.identities`).
    """
    facts_in_file = facts_of(file)
    if facts_in_file.get("run") not in identities:
        raise UserError(
            f"{file} has weights of another run than {RUN_FILE} says: put back those that this run kept, or remove them"
        )
    facts_in_file["step"] = step_of(file, step)
    expected = {"kind": kind, "step": step, **facts}
    for name, value in expected.items():
        stated = facts_in_file.get(name)
        if stated != value:
            raise UserError(f"{file} says that its {name} is {stated}, not {value}: put each file back in its place")


def require_same_run(index: Index, run: Run, step: int | None, *, accept: bool) -> None:
    """Raise UserError where a folder's run.yaml is not what its checkpoint holds, or another run is asked for.

    The checkpoint is that of `step`, or the last one. What may change is noted, as is all with `accept`.
    """
    recorded_run = index.recorded_run
    if recorded_run is None:
        return
    trained_run = _last_readable_run(index, step)
    resolved = dict(recorded_run.run.resolved)
    if trained_run:
        resolved.update(trained_run.run.resolved)
    require_same_code(recorded_run.run, resolved, index.folder)
    if accept:
        return

    way_out = f"or take them as they are by --accept, which notes them in {RUN_FILE}"
    if trained_run:
        edited = [difference for difference in trained_run.differences_from(recorded_run) if not difference.may_change]
        if edited:
            lines = [f"{index.folder / RUN_FILE} is not as it was trained:", *trained_run.lines(edited, recorded_run)]
            raise UserError("\n  ".join(lines) + f"\nPut these fields back, {way_out}")
    requested = [difference for difference in differences(recorded_run.run, run) if not difference.may_change]
    if requested:
        lines = [f"{index.folder} holds another run:", *map(str, requested)]
        other_folder = "Give another folder with --out, or remove this one"
        raise UserError("\n  ".join(lines) + f"\n{other_folder}, {way_out}")


def _last_readable_run(index: Index, step: int | None) -> CheckpointRun | None:
    """The run that the checkpoint of `step` holds, or the last one that can be read; None: there is none."""
    for checkpoint_step, checkpoint in reversed(index.checkpoints.by_step().items()):
        if step not in (None, checkpoint_step):
            continue
        with suppress(UserError):  # who begins there looks at the whole of it
            return index.checkpoint_run(checkpoint)
    return None


def run_before_step(index: Index, checkpoint: Checkpoint | None) -> RecordedRun | None:
    """The run that the steps up to a checkpoint were of, and what had changed in it; None: none was written down."""
    recorded_run = index.recorded_run
    if recorded_run is None:
        return None
    if checkpoint is None:
        return recorded_run
    trained_run = index.checkpoint_run(checkpoint)
    later_changes_of_data = [
        change for change in recorded_run.past if change.is_of_data and change.step >= trained_run.step
    ]
    return RecordedRun(trained_run.run, [*trained_run.past, *later_changes_of_data])
