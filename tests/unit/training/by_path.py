"""Checkpoints by their paths: each call reads the disk anew."""

from collections.abc import Collection
from pathlib import Path

from dumo.training import checkpoint
from dumo.training.checkpoint import Checkpoint, Checkpoints
from dumo.training.state import State


def latest(folder: Path, parts: Collection[str] | None = None, *, together: bool = False) -> Path | None:
    """The last whole checkpoint in a folder."""
    found = Checkpoints(folder).latest(parts, together=together)
    return found.path if found else None


def fault(place: Path, parts: Collection[str] | None = None, *, together: bool = False) -> str | None:
    """What is wrong with a checkpoint."""
    return Checkpoints(place.parent).find_fault(int(place.name.removeprefix("step-")), parts, together=together)


def save(folder: Path, state: State, keep: int, run_text: str = "") -> Path:
    """Write the checkpoint of a state's step into a folder."""
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, run_text, keep=keep)
    return checkpoints.path(state.step)


def restore(place: Path, state: State) -> None:
    """Load a checkpoint into a state."""
    checkpoint.restore(Checkpoint.read(place), state)


def restore_last_finite(place: Path, state: State) -> Path:
    """Restore a checkpoint, or the last good one before it."""
    checkpoints = Checkpoints(place.parent)
    return checkpoint.restore_last_finite(checkpoints, Checkpoint.read(place), state).path
