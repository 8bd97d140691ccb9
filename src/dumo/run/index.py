"""What a run's folder holds, read when the run is opened.

`Index.read` reads run.yaml and lists the checkpoints. The rest is read when it is first asked for, and then kept: each
checkpoint's list and run, and data.json. Whoever opens a run passes its index on, so that all see the same. An index is
of one moment: after waiting for another process that wrote there, read a new one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dumo.config.difference import Difference, differences
from dumo.config.history import RecordedRun
from dumo.config.load import run_of
from dumo.config.source import RUN_FILE, RecordedChange, RunText, parse_text, read_file
from dumo.config.spec import Run
from dumo.run.data import DataNote, read_note
from dumo.training import manifest
from dumo.training.manifest import Checkpoint, Checkpoints
from dumo.types import UserError

# The weights of an exported run (`dumo.export.own`), which has no checkpoints.
EXPORTED_WEIGHTS = "model.safetensors"
_FUNCTION_PARTS = ("data", "net", "objective", "path")  # of a run: they say which function its weights make


@dataclass(frozen=True)
class CheckpointRun(RecordedRun):
    """The run that a checkpoint holds, with what was changed before its step."""

    name: str
    step: int

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> "CheckpointRun":
        """The run of a checkpoint. Raises UserError if it is damaged."""
        run_text = parse_text(checkpoint.run_text, checkpoint.path / manifest.RUN)
        return cls(run_of(run_text), run_text.changed, checkpoint.path.name, checkpoint.manifest.step)

    def differences_from(self, recorded_run: RecordedRun) -> list[Difference]:
        """Return where run.yaml still differs, once the changes that it lists from the step on are applied to this run.

        Accepted later changes of what the weights compute come first.
        """
        changes_since = [change for change in recorded_run.past if change.step >= self.step]
        return [
            *later_changes_of_function(recorded_run.past, self.step),
            *differences(self.replayed(changes_since), recorded_run.run),
        ]

    def lines(self, run_differences: Sequence[Difference], recorded_run: RecordedRun) -> list[str]:
        """The differences from a run.yaml in words, a line each."""
        changed_since = {change.field for change in recorded_run.past if change.step >= self.step}
        lines: list[str] = []
        for difference in run_differences:
            here = "as noted" if difference.field in changed_since else f"in checkpoint {self.name}"
            lines.append(difference.between(here, f"in {RUN_FILE}"))
        return lines


def later_changes_of_function(past: Sequence[RecordedChange], step: int) -> list[Difference]:
    """The changes, accepted after `step`, of fields that make another function of the weights of that step."""
    later_changes: list[Difference] = []
    for change in past:
        if not change.accepted or change.is_of_data or change.step <= step:
            continue
        if change.field.split(".")[0] in _FUNCTION_PARTS:
            later_changes.append(Difference(change.field, change.was, change.now, may_change=False))
    return later_changes


@dataclass(frozen=True)
class Index:
    """What a run's folder held when it was opened."""

    folder: Path
    text: RunText | None  # of run.yaml; None: there is none
    checkpoints: Checkpoints
    _runs: dict[Path, CheckpointRun] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Read run.yaml, if there is one. Raises UserError if it cannot be read."""
        file = folder / RUN_FILE
        text = read_file(file) if file.is_file() else None
        return cls(folder, text, Checkpoints(folder / "checkpoints"))

    @cached_property
    def recorded_run(self) -> RecordedRun | None:
        """The run of run.yaml, and what had changed in it. Raises UserError where it is no run."""
        return RecordedRun.from_text(self.text) if self.text else None

    @property
    def exported_weights(self) -> Path | None:
        """The weights of an exported run; None if the folder is not an export."""
        file = self.folder / EXPORTED_WEIGHTS
        return file if file.is_file() else None

    @property
    def past(self) -> Sequence[RecordedChange]:
        """What had changed in the run of run.yaml; () where there is none. Raises UserError where it is no run."""
        return self.recorded_run.past if self.recorded_run else ()

    def run(self, overrides: Sequence[str]) -> Run:
        """The run of run.yaml with these fields changed. Raises UserError where there is none, or it is no run."""
        if self.text is None:
            raise UserError(f"{self.folder} has no {RUN_FILE}")
        if not overrides and self.recorded_run:
            return self.recorded_run.run
        return run_of(self.text, overrides)

    def checkpoint_run(self, checkpoint: Checkpoint) -> CheckpointRun:
        """The run that a checkpoint holds, as `CheckpointRun.read`."""
        if checkpoint.path not in self._runs:
            self._runs[checkpoint.path] = CheckpointRun.read(checkpoint)
        return self._runs[checkpoint.path]

    @cached_property
    def data_note(self) -> DataNote | None:
        """What data.json says. Raises UserError for a damaged file."""
        return read_note(self.folder)
