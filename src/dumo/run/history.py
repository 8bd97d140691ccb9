"""What has changed in a run's folder when training begins or goes on there: compared, then written down.

`run.job` calls `History.of` on rank 0, which compares run and data with what the folder holds, and writes nothing. Once
all ranks have read the folder, `run.train` calls `History.write`. It

1. takes back what came after the step from which training goes on
2. compares the log with what the checkpoint lists
3. writes run.yaml, with the changes noted, data.json and images.ledger
4. notes what was asked for and is obeyed by this
5. says what has changed
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dumo.config.change import yaml_text
from dumo.config.fit import advice
from dumo.config.place import LOG_FILE
from dumo.config.source import RecordedChange
from dumo.config.spec import Run
from dumo.io.source import DataSource
from dumo.run import data as run_data
from dumo.run.data import NOTE_FILE, Change, changed_data_error
from dumo.run.folder import (
    BEST_FOLDER,
    mark_checkpoint_written,
    mark_no_checkpoint_yet,
    set_best_aside,
    write_run_file,
)
from dumo.run.index import Index
from dumo.run.provenance import run_before_step
from dumo.run.request import Request
from dumo.runtime.device import software_versions
from dumo.training import log, manifest
from dumo.training.manifest import Checkpoint

PACKAGES = ("dumo", "torch")  # whose versions change what a step computes


@dataclass(frozen=True)
class History:
    """What has changed in a folder's run when it goes on after `step`. Rank 0 alone makes and writes it."""

    run: Run
    index: Index
    source: DataSource
    checkpoint: Checkpoint | None  # the one that is resumed
    step: int
    fingerprint: str | None  # of the data now
    changes: Sequence[RecordedChange]  # of fields and data, since the run began
    versions: dict[str, str]  # of the packages that wrote the checkpoint; {}: it begins
    listed_log: manifest.FileEntry | None  # the log as the checkpoint lists it; None: it does not, or there is none
    has_other_data: bool  # whether the data have changed since the checkpoint, and that is accepted

    @classmethod
    def of(
        cls,
        run: Run,
        index: Index,
        source: DataSource,
        step: int,
        checkpoint: Checkpoint | None,
        *,
        accept: bool,
        change: Change | None,
    ) -> "History":
        """Compare run and data with what the folder holds; nothing is written.

        `checkpoint` is the one that is resumed, `change` how the contents of its data have changed. Raises UserError
        if the data have another fingerprint, and that is not accepted (`accept`).
        """
        noted_fingerprint = index.data_note.fingerprint if index.data_note else None
        fingerprint = source.fingerprint()
        run_before = run_before_step(index, checkpoint)
        changes = run_before.changes_to_record(run, step) if run_before else []
        if checkpoint and noted_fingerprint is not None and noted_fingerprint != fingerprint:
            if not accept:
                raise changed_data_error(
                    index.folder, f"fingerprint {noted_fingerprint} in {NOTE_FILE}, {fingerprint} now"
                )
            change = Change(noted_fingerprint, str(fingerprint))
        if change:
            changes = [*changes, RecordedChange(step=step, field="data", was=change.was, now=change.now, accepted=True)]
        return cls(
            run=run,
            index=index,
            source=source,
            checkpoint=checkpoint,
            step=step,
            fingerprint=fingerprint,
            changes=changes,
            versions=checkpoint.manifest.versions if checkpoint else {},
            listed_log=checkpoint.manifest.log if checkpoint else None,
            has_other_data=change is not None,
        )

    def write(self, request: Request | None) -> Iterator[str]:
        """Bring the folder to `step`: rewind it, note run and data. Yields lines for the user.

        The log after the step is always moved aside, and weights after it are removed: checkpoints only where the
        `request` is to go back. None: nothing is asked for that was not obeyed before.
        """
        goes_back = request is not None and request.step is not None
        folder = self.index.folder
        log_file = folder / LOG_FILE

        # take back what came after the step
        undone_rows = 0
        if log_file.exists() and (goes_back or self.step == 0):
            undone_rows = sum(row["step"] > self.step for row in log.read_log(log_file))
        if self.step == 0 and undone_rows:
            yield (
                f"{folder} has no checkpoint, so it starts again from step 0; {undone_rows:,} rows of its log are "
                f"kept in {log.undone_rows_path(log_file)}"
            )
        yield from self._remove_later_weights(goes_back=goes_back)
        if goes_back and undone_rows:
            yield f"{undone_rows:,} rows of the log after it are kept in {log.undone_rows_path(log_file)}"
        log.rewind(log_file, self.step)
        yield from self._take_back_best_weights()

        # compare the log with what the checkpoint lists
        if self.listed_log is not None and self.listed_log != log.entry_of(log_file):
            yield f"{log_file} is not what was logged up to step {self.step:,}: weights do not depend on it, curves do"

        # note the run and its data
        write_run_file(self.run, folder, self.changes)
        if self.step == 0:
            mark_no_checkpoint_yet(folder)
        else:
            mark_checkpoint_written(folder)
        # at step 0 data.json may be of a start that was killed, and of images that have changed since
        measures_anew = self.has_other_data or self.step == 0
        data_note = run_data.update_note(
            folder, self.index.data_note, self.source, self.fingerprint, anew=measures_anew
        )
        run_data.begin_ledger(folder, self.source, self.checkpoint, anew=self.has_other_data)
        if request:
            request.note()

        yield from self._change_lines()
        yield from advice(self.run, data_note.sd)

    def _remove_later_weights(self, *, goes_back: bool) -> Iterator[str]:
        """Remove the weights after the step: the steps that follow may lead elsewhere. Yields a line if there were any.

        Where the run does not go back, the checkpoints after the step are damaged: they stay, since they may be mended,
        until a new one of their step replaces them. The best weights are then left to `_take_back_best_weights`.
        """
        folder = self.index.folder
        places_to_keep: set[Path] = set()
        if not goes_back:
            places_to_keep = {self.index.checkpoints.folder, folder / BEST_FOLDER}
        removed_steps: set[int] = set()
        for place in manifest.weight_folders(folder):
            if place not in places_to_keep:
                removed_steps.update(manifest.rewind(place, self.step))
        if removed_steps:
            steps_text = ", ".join(f"{step:,}" for step in sorted(removed_steps))
            yield f"going on from step {self.step:,}: what came after it is removed, the weights of steps {steps_text}"

    def _take_back_best_weights(self) -> Iterator[str]:
        """Remove the best weights after the step; from step 0 on, set all aside, and yield a line if there were any."""
        folder = self.index.folder
        if self.step > 0:
            manifest.rewind(folder / BEST_FOLDER, self.step)
            return
        best_aside = set_best_aside(folder)
        if best_aside:
            yield f"the best weights of before it starts again are kept in {best_aside}"

    def _change_lines(self) -> Iterator[str]:
        """Yield a line for each thing that is another one from `step` on: fields, rates, versions of packages."""
        for change in self.changes:
            if change.step == self.step:
                now = yaml_text(change.now)
                was = yaml_text(change.was)
                yield f"from step {self.step:,} on {change.field} is {now}, and was {was}"
        if self.versions:
            versions = software_versions()
            for name in PACKAGES:
                version = versions[name]
                version_before = self.versions.get(name, version)
                if version_before != version:
                    yield (
                        f"{name} is {version}, and was {version_before} up to step {self.step:,}: numbers may round "
                        "otherwise"
                    )
