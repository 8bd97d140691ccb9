"""A run's folder: `RunFolder` reads and writes the files of a training.

    run.yaml           the config, a hash of the fields that affect training, and the run's `Origin`, if any
    changes.jsonl      a line for each permitted change of a field; nothing reads it
    checkpoints/       training states, each with the run.yaml of its step
    milestones/ best/  the sampled weights at chosen steps, and those with the best validation score
    metrics.jsonl      the log
    images.ledger      hashes of the images at the time they were read
    .training.lock     exists, and is locked, while a process trains in the folder
    .saved             marks that a checkpoint was written, so that lost checkpoints are noticed

Other modules add teacher.json and pairs/ (`dumo.run.teacher`), speed.jsonl, sheets/ and tracker-id, and commands add
outputs such as samples/ and report.html.

Training locks the folder, compares the run with its files (`require_resumable`, `require_same_config`), and then
rewinds it to the step from which it resumes (`begin_at`). Until then only the lock is written. A run that starts from a
checkpoint of another run reads it in that run's folder, and `begin_at` copies it.
"""

import json
import shutil
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path

from safetensors import SafetensorError

from dumo.config.code import require_same_code
from dumo.config.difference import config_hash, differences
from dumo.config.load import dump, run_of
from dumo.config.place import LOG_FILE, RUN_FILE
from dumo.config.source import HASH_KEY, ORIGIN_KEY, Origin, RunText, parse_text, read_file
from dumo.config.spec import Run
from dumo.evaluation.metric import higher_is_better
from dumo.io import file as files
from dumo.io.guard import guard_path, locked, require_in_place
from dumo.io.tensor_files import facts_of
from dumo.io.yaml import yaml_text
from dumo.runtime import shell_path
from dumo.runtime.device import software_versions
from dumo.training import agreement, log
from dumo.training.checkpoint import (
    STATE_FILE,
    Checkpoint,
    Checkpoints,
    FileEntry,
    paths_by_step,
    step_of,
    write_state_file,
)
from dumo.training.milestone import save_weights
from dumo.training.state import State
from dumo.types import UserError

LOCK_FILE = ".training.lock"
CHECKPOINT_MARK = ".saved"
CHANGES_FILE = "changes.jsonl"
BEST_FOLDER = "best"
# The weights of an exported run (`dumo.export.dumo_run`), which has no checkpoints.
EXPORTED_WEIGHTS = "model.safetensors"
# Metadata of a file of best weights: its kind, and the key of its score.
_BEST_KIND = "best weights"
_SCORE = "score"
# Packages whose versions change how a step rounds.
_PACKAGES = ("dumo", "torch")


@dataclass(frozen=True)
class BestWeights:
    """A weights file in best/ and its score."""

    file: Path
    step: int
    metric: str
    value: float
    # The name of the evaluation protocol, and the NFE of the samples.
    protocol: str
    nfe: int


class RunFolder:
    """A run's folder. Its files are read lazily and cached."""

    def __init__(self, path: Path) -> None:
        """Set the path of the folder, which need not exist."""
        self.path = path
        # The text of run.yaml as last written, which each checkpoint copies; "" on ranks other than 0.
        self.written_text = ""
        self.checkpoints = Checkpoints(path / "checkpoints")

    # ----------------------------------------------------------------------------------------------------- contents

    @cached_property
    def text(self) -> RunText | None:
        """The parsed text of run.yaml; None if it does not exist."""
        file = self.path / RUN_FILE
        return read_file(file) if file.is_file() else None

    @cached_property
    def run(self) -> Run | None:
        """The run of run.yaml; None if it does not exist."""
        return run_of(self.text) if self.text else None

    @property
    def origin(self) -> Origin | None:
        """The checkpoint of another run from which this run started; None if there is none."""
        return self.text.origin if self.text else None

    @property
    def exported_weights(self) -> Path | None:
        """The weights of an exported run; None if the folder is not an export."""
        file = self.path / EXPORTED_WEIGHTS
        return file if file.is_file() else None

    @property
    def _weight_folders(self) -> list[Path]:
        """The folders that contain weights by step: checkpoints, milestones and best weights."""
        return [self.checkpoints.folder, self.path / "milestones", self.path / BEST_FOLDER]

    @property
    def log_file(self) -> Path:
        """The path of the training log."""
        return self.path / LOG_FILE

    # ---------------------------------------------------------------------------------------------- before training

    @contextmanager
    def lock(self) -> Generator["RunFolder", None, None]:
        """Create the folder if it is missing, and lock it against other trainings. Every rank must enter it.

        Rank 0 holds the lock. Partially written files of a killed training are removed. Inside the context, writes fail
        once the folder, or a subfolder on another disk, was moved or unmounted. A new folder that is empty at the end
        is removed.

        Raise UserError if another process trains in the folder, or if it contains files but no run.
        """
        with ExitStack() as stack:
            agreement.on_main_rank(lambda: stack.enter_context(self._locked()))
            yield self

    @contextmanager
    def _locked(self) -> Generator[None, None, None]:
        """Lock the folder in this process."""
        self.require_free()
        new_folders = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            busy = f"{self.path} is being trained by another process: wait for it, or give another folder with --out"
            with locked(self.path / LOCK_FILE, busy):
                self._remove_half_written()
                with self._guarded():
                    yield
        finally:
            # rmdir keeps folders that are not empty.
            with suppress(OSError):
                for new_folder in new_folders:
                    new_folder.rmdir()

    def require_free(self) -> None:
        """Raise UserError if the folder contains files but no run. Leftovers of a killed training do not count."""
        if (self.path / RUN_FILE).exists() or not self.path.is_dir():
            return
        for path in self.path.iterdir():
            if path.name != LOCK_FILE and not _is_half_written(path):
                raise UserError(f"{self.path} is not empty and holds no {RUN_FILE}: give another folder with --out")

    def _remove_half_written(self) -> None:
        """Remove partially written files of a killed training."""
        half_written = [path for path in self.path.iterdir() if _is_half_written(path)]
        for place in self._weight_folders:
            half_written += place.glob(".step-*.tmp")
        for path in half_written:
            files.remove(path)

    @contextmanager
    def _guarded(self) -> Generator[None, None, None]:
        """Make writes fail once the folder, or a subfolder on another disk, was moved or unmounted."""
        guarded = [self.path]
        for place in self._weight_folders:
            if is_on_other_disk(place, self.path):
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

    def origin_checkpoint(self, origin: Origin) -> Checkpoint:
        """Read the checkpoint of another run from which this run starts. Every rank must call it and hashes a share.

        Raise UserError on all ranks if the checkpoint is missing or damaged.
        """
        source = RunFolder(Path(origin.run))
        checkpoint = agreement.on_each_rank(lambda: source.checkpoint_at(origin.step))
        fault = source.checkpoints.find_fault(origin.step, together=True)
        if fault:
            raise UserError(f"{fault}: start from another step")
        # Drop the log and the ledger of the other run.
        facts = checkpoint.facts.model_copy(update={"log": None, "ledger": None})
        return replace(checkpoint, facts=facts)

    def _copy(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint of another run, with this run's run.yaml."""
        self.checkpoints.folder.mkdir(exist_ok=True)
        target = self.checkpoints.path(checkpoint.facts.step)
        temp_path = files.temp_path_for(target)
        files.remove(temp_path)
        shutil.copytree(checkpoint.path, temp_path)
        run_file = temp_path / RUN_FILE
        shutil.copy(self.path / RUN_FILE, run_file)
        write_state_file(temp_path, checkpoint.facts, {**checkpoint.files, RUN_FILE: FileEntry.of(run_file)})
        files.commit(temp_path, target, durable=True)

    def checkpoint_at(self, step: int) -> Checkpoint:
        """Read the checkpoint of a step. Raise UserError if it does not exist."""
        steps = self.checkpoints.steps()
        if step not in steps:
            existing = ", ".join(map(str, steps)) or "none"
            raise UserError(f"--from {step}: {self.path} has no checkpoint of that step; its checkpoints: {existing}")
        return self.checkpoints.read(step)

    def newest_checkpoint(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None without checkpoints. Every rank must call it and hashes a share.

        Raise UserError on all ranks if the ranks see different checkpoints, or if all checkpoints are damaged.
        """
        steps_by_rank = agreement.gather_results(self.checkpoints.steps)
        texts = [", ".join(map(str, steps)) or "none" for steps in steps_by_rank]
        for rank, text in enumerate(texts):
            if text != texts[0]:
                raise UserError(
                    f"{self.checkpoints.folder}: rank 0 sees checkpoints of steps {texts[0]}, and rank {rank} of steps "
                    f"{text}: train in a folder on a file system that all ranks share"
                )
        return self.checkpoints.latest(together=True)

    def require_resumable(self, origin: Origin | None = None) -> None:
        """Raise UserError if the folder has lost its checkpoints or is an export, which has no training state.

        Also raise it if `origin` is given and the folder contains a run with another origin.
        """
        if origin and self.text and self.origin != origin:
            raise UserError(
                f"{self.path} holds another run, not one that began from step {origin.step} of {origin.run}: give "
                "another folder with --out"
            )
        if self.checkpoints.steps():
            return
        if self.exported_weights:
            raise UserError(
                f"{self.path} is an export, which has no optimizer state to resume from: start a new run from its "
                f"weights with start.source={self.path}"
            )
        if self.text and self._has_saved:
            raise UserError(
                f"{self.path} had checkpoints, but {self.checkpoints.folder} is empty: mount its disk or restore "
                "them, or use --out to train from the start in another folder"
            )

    @property
    def _has_saved(self) -> bool:
        """Whether a checkpoint was written. If the log is missing as well, the user has cleared the run."""
        return self.log_file.exists() and (self.path / CHECKPOINT_MARK).exists()

    def require_same_config(self, run: Run, checkpoint: Checkpoint | None, place: Path | None = None) -> None:
        """Raise UserError if `run` differs from a checkpoint in code or in fields that affect training.

        Without a checkpoint, `run` is compared with run.yaml. `place` is the path to name in the message.
        """
        text = self.text
        if checkpoint:
            text = parse_text(checkpoint.run_text, checkpoint.path / RUN_FILE)
        if text is None or text.hash is None:
            return
        trained_run = run_of(text)
        require_same_code(run, trained_run.resolved, self.path)
        if text.hash == config_hash(run):
            return
        lines = [str(difference) for difference in differences(trained_run, run) if difference.decides]
        way_out = f"use another folder with --out, or remove {self.path}"
        if checkpoint:
            step = checkpoint.facts.step
            way_out = f"start a new run from it:  dumo train {shell_path(self.path)} --from {step} --out NEW"
        lines_text = "\n  ".join(lines or [f"{RUN_FILE} was edited, or written by another version of dumo"])
        raise UserError(
            f"{place or (checkpoint.path if checkpoint else self.path)} belongs to a different run:\n  {lines_text}\n"
            f"Reset these fields, or {way_out}"
        )

    # ------------------------------------------------------------------------------------------------ while it trains

    def begin_at(
        self, run: Run, checkpoint: Checkpoint | None, step: int, origin: Origin | None = None
    ) -> Iterator[str]:
        """Rewind the folder to a step: remove later rows and weights, and write run.yaml. Only rank 0 calls it.

        - `checkpoint`: the checkpoint to resume from; None for a new run.
        - `origin`: the location of the checkpoint if it belongs to another run; it is then copied.

        Yield lines for the user.
        """
        # Remove the log rows after the step, because these steps are logged again.
        if step == 0 and self.log_file.exists() and any(row["step"] for row in log.read_log(self.log_file)):
            yield f"{self.path} has no checkpoint, so it starts again from step 0"
        log.rewind(self.log_file, step)
        listed_log = checkpoint.facts.log if checkpoint else None
        if listed_log is not None and listed_log != log.entry_of(self.log_file):
            yield (
                f"{self.log_file} is not what was logged up to step {step:,}: weights do not depend on it, curves do"
            )

        # Remove the weights after the step, because the repeated steps may produce other weights. Later checkpoints
        # are damaged; they are kept for repair until a new checkpoint of the same step replaces them.
        for name in ("milestones", BEST_FOLDER):
            for file_step, file in paths_by_step(self.path / name, ".safetensors").items():
                if file_step > step:
                    file.unlink()

        # Write the run before copying the checkpoint it starts from, so that a training killed in between starts from
        # that checkpoint again.
        yield from self._record_changes(run, step)
        self.write_run(run, origin or self.origin)
        if origin and checkpoint:
            self._copy(checkpoint)
        if step == 0:
            (self.path / CHECKPOINT_MARK).unlink(missing_ok=True)
        else:
            self.mark_checkpoint_written()

        # Report changed package versions, which may round differently.
        versions_before = checkpoint.facts.versions if checkpoint else {}
        for name in _PACKAGES:
            version = software_versions()[name]
            version_before = versions_before.get(name, version)
            if version_before != version:
                yield f"{name} is {version}, and was {version_before} up to step {step:,}: it may round differently"

    def _record_changes(self, run: Run, step: int) -> Iterator[str]:
        """Append the fields in which `run` differs from run.yaml to changes.jsonl. Yield a line for each."""
        if self.run is None or step == 0:
            return
        rows: list[str] = []
        for difference in differences(self.run, run):
            # Fields that affect training match the checkpoint; only run.yaml may have been edited.
            if difference.decides or difference.field.split(".")[0] == "resolved":
                continue
            row = {"step": step, "field": difference.field, "was": difference.was, "now": difference.now}
            rows.append(json.dumps(row) + "\n")
            now, was = yaml_text(difference.now), yaml_text(difference.was)
            yield f"from step {step:,} on {difference.field} is {now}, and was {was}"
        if rows:
            with (self.path / CHANGES_FILE).open("a", encoding="utf-8") as changes:
                changes.writelines(rows)

    def write_run(self, run: Run, origin: Origin | None = None) -> None:
        """Write run.yaml and flush it to disk."""
        header: dict[str, object] = {HASH_KEY: config_hash(run)}
        if origin:
            header[ORIGIN_KEY] = origin.model_dump()
        file = self.path / RUN_FILE
        self.written_text = dump(run, header)
        files.write(file, self.written_text.encode(), durable=True)
        self.text = parse_text(self.written_text, file)
        self.run = run

    def mark_checkpoint_written(self) -> None:
        """Mark that the run has a checkpoint, so that missing checkpoints are reported as lost.

        Raise UserError if the folder was moved (`require_in_place`).
        """
        mark = self.path / CHECKPOINT_MARK
        require_in_place(mark)
        if not mark.exists():
            mark.touch()
            files.flush(self.path)

    # ------------------------------------------------------------------------------------------------- best weights

    def find_best(self, run: Run, max_step: int | None = None) -> BestWeights | None:
        """Return the newest best weights up to step `max_step`, or None if there are none.

        Raise UserError if `run` did not write them.
        """
        files_by_step = paths_by_step(self.path / BEST_FOLDER, ".safetensors")
        steps = [step for step in files_by_step if max_step is None or step <= max_step]
        if not steps:
            return None
        step = steps[-1]
        file = files_by_step[step]
        require_own_file(file, run, _BEST_KIND, step)
        score = facts_of(file)[_SCORE]
        return BestWeights(file, step, score["name"], score["value"], score["protocol"], score["nfe"])

    def save_if_best(self, run: Run, state: State, *, metric: str, value: float, protocol: str, nfe: int) -> None:
        """Write the sampled weights if their score is finite and the best for this metric, protocol and NFE.

        Every rank must call it with the same score. Raise UserError if the folder contains best weights of another run.
        """
        # Refuse best weights of another run whatever the score is.
        previous = agreement.on_main_rank(lambda: self.find_best(run))
        if not isfinite(value):
            return
        if previous and (previous.metric, previous.protocol, previous.nfe) == (metric, protocol, nfe):
            is_better = value > previous.value if higher_is_better(metric) else value < previous.value
            if not is_better:
                return
        score = {"protocol": protocol, "nfe": nfe, "name": metric, "value": value}
        folder = self.path / BEST_FOLDER
        save_weights(folder, state, state.sampled_net, _BEST_KIND, config_hash(run), **{_SCORE: score})

    def remove_older_best(self, checkpoint_steps: Collection[int]) -> None:
        """Remove best weights that no resumed run needs. Called after a checkpoint is written.

        A run that resumes from a checkpoint needs the last best weights up to its step. Weights newer than the last
        checkpoint are kept; a resumed run removes them.
        """
        files_by_step = paths_by_step(self.path / BEST_FOLDER, ".safetensors")
        kept_steps = {step for step in files_by_step if step > max(checkpoint_steps)}
        for checkpoint_step in checkpoint_steps:
            steps_up_to_checkpoint = [step for step in files_by_step if step <= checkpoint_step]
            kept_steps.update(steps_up_to_checkpoint[-1:])
        for step, path in files_by_step.items():
            if step not in kept_steps:
                path.unlink()

    # ----------------------------------------------------------------------------------------- weights of other files

    def require_own_weights(self, run: Run, place: Path) -> None:
        """Raise UserError if a weights file or a part of a checkpoint belongs to another run."""
        owner = facts_of(place).get("run")
        for folder in (place, place.parent):
            if not (folder / STATE_FILE).is_file():
                continue
            if folder.resolve().parent == self.checkpoints.folder.resolve():
                self.require_same_config(run, Checkpoint.read(folder), place)
                return
            owner = parse_text(Checkpoint.read(folder).run_text, folder / RUN_FILE).hash
            break
        if owner not in (None, config_hash(run)):
            raise UserError(f"{place} has the weights of another run than {self.path}: use other weights")


def require_own_file(file: Path, run: Run, kind: str, step: int) -> None:
    """Raise UserError if a weights file belongs to another run, or does not match its folder and step."""
    facts: Mapping[str, object] = facts_of(file)
    if facts.get("run") != config_hash(run):
        raise UserError(
            f"{file} has the weights of another run than {RUN_FILE}: restore the run's weights, or remove the file"
        )
    for name, value in {"kind": kind, "step": step}.items():
        stated = step_of(file, step) if name == "step" else facts.get(name)
        if stated != value:
            raise UserError(f"{file} has {name} {stated} instead of {value}: restore the original files")


def is_on_other_disk(place: Path, folder: Path) -> bool:
    """Whether the subfolder `place` is on another disk than `folder`, by a link or a mount."""
    return place.is_dir() and place.stat().st_dev != folder.stat().st_dev


def _is_half_written(path: Path) -> bool:
    """Whether a path at the top of a run's folder is a partially written file."""
    return path.name.startswith((f".{RUN_FILE}.", f".{LOG_FILE}.")) and not path.is_dir()
