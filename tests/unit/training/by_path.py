"""Checkpoints by their paths: each call reads the disk anew."""

from collections.abc import Collection
from pathlib import Path

from dumo.training import checkpoint
from dumo.training.checkpoint import CheckpointNotes
from dumo.training.manifest import Checkpoint, Checkpoints
from dumo.training.state import State


def latest(folder: Path, parts: Collection[str] | None = None, *, together: bool = False) -> Path | None:
    """The last whole checkpoint in a folder."""
    found = Checkpoints(folder).latest(parts, together=together)
    return found.path if found else None


def fault(place: Path, parts: Collection[str] | None = None, *, together: bool = False) -> str | None:
    """What is wrong with a checkpoint."""
    return Checkpoint(place).fault(parts, together=together)


def save(folder: Path, state: State, keep: int, notes: CheckpointNotes | None = None) -> Path:
    """Write the checkpoint of a state's step into a folder."""
    return checkpoint.save_copy(Checkpoints(folder), checkpoint.copy(state, notes or CheckpointNotes(), {}), keep)


def restore(place: Path, state: State) -> None:
    """Load a checkpoint into a state."""
    checkpoint.restore(Checkpoint(place), state)


def restore_last_finite(place: Path, state: State, *, or_before: bool = True) -> Path:
    """Restore a checkpoint, or the last good one before it."""
    checkpoints = Checkpoints(place.parent)
    return checkpoint.restore_last_finite(checkpoints, checkpoints.at(place), state, or_before=or_before).path
