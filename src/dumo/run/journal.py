"""What a run writes down as it trains: log, milestones, checkpoints; and what has changed when it goes on.

Before the first step, on rank 0, `History.of` compares run, data and log with what the folder holds, and
`History.write` brings the folder to the step from which training goes on. Then every rank has a `Journal`. The training
calls `Journal.open`; the loop calls `Journal.hooks` after each step: log, then milestone, then checkpoint, where they
are due. A skipped step and a burst are said at once, with what to type (`resume_hint`).
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any

import torch

from dumo.autodiff import float64
from dumo.config.advice import advice
from dumo.config.change import shown
from dumo.config.difference import identity
from dumo.config.load import RUN_FILE, dump
from dumo.config.place import LOG_FILE
from dumo.config.source import Noted
from dumo.config.spec import Run
from dumo.io.source import DataSource
from dumo.nets.embed import Scalars
from dumo.run import datacheck, datanote, examination
from dumo.run.folder import (
    BEST_FOLDER,
    mark_checkpoint_written,
    mark_no_checkpoint_yet,
    restore_run_file,
    set_best_aside,
    write_run_file,
)
from dumo.run.index import Index
from dumo.run.memory import weight_bytes
from dumo.run.net import outline
from dumo.run.provenance import run_before_step
from dumo.run.weights import build
from dumo.runtime import dist, signals
from dumo.runtime.device import software_versions, total_memory
from dumo.runtime.door import train_call
from dumo.runtime.heap import low_memory_heap
from dumo.runtime.text import bytes_text
from dumo.runtime.threads import StepThreads
from dumo.training import agreement, checkpoint, layout, log, loop, manifest
from dumo.training.burst import BURST_STEPS, WINDOW
from dumo.training.deadline import FIRST_SAVE, JUDGE, SAVE, SECONDS_PER_MINUTE, Countdown
from dumo.training.manifest import Checkpoint, Checkpoints
from dumo.training.optim import Muon, embedders, half_rates
from dumo.training.record import Record, Skipped
from dumo.training.saver import Saver
from dumo.training.spec import Train
from dumo.training.state import State

if TYPE_CHECKING:
    from dumo.io.content import Hashes
    from dumo.run.best import BestFolder
    from dumo.run.teacher import TeacherPairs
    from dumo.run.validation import Scores, Validation

PROGRAMS = ("dumo", "torch")  # whose versions change what a step computes
CALM = 8  # the rate of an embedder of times over this ended every burst that we measured (docs/log.md)


@dataclass
class Journal:
    """Writes log, milestones and checkpoints. Every rank has one, and must call each method alike."""

    run: Run
    folder: Path
    device: torch.device
    checkpoints: Checkpoints
    source: "DataSource | TeacherPairs"
    tell: Callable[[str], None]
    hashes: "Hashes | None" = None  # of the data
    changed: Sequence[Noted] | None = None  # what was changed in the run; None except on rank 0
    countdown: Countdown | None = None  # None: it ends by its steps
    is_examined: bool = False  # whether the slope was examined on weights in training
    has_saved: bool = False  # whether a checkpoint was saved
    best_folder: "BestFolder | None" = None
    validation: "Validation | None" = None
    threads: StepThreads | None = None  # of the steps; None: nobody chooses
    last_saved: float = field(default_factory=time.monotonic)  # seconds: when the last checkpoint was taken
    saver: Saver = field(default_factory=Saver)

    @property
    def text(self) -> str:
        """The run as its checkpoints hold it; "" except on rank 0."""
        return "" if self.changed is None else dump(self.run, self.changed)

    @property
    def first_saved_step(self) -> int:
        """The first step that is saved by its number: up to it weights are examined before they are saved."""
        return self.run.train.first_saved_step

    @property
    def hooks(self) -> tuple[loop.Every, ...]:
        """What the loop calls after each step, in this order: log, milestones, checkpoints."""
        return loop.Every(1, self.log), loop.Every(1, self.mark), loop.Every(1, self.keep)

    def due(self) -> bool:
        """Whether a checkpoint is due by this rank's clock, or the last one failed to be written.

        A failure is of all ranks, so that of the first one brings all to where it is raised. A run that ends by the
        clock saves its first one early, to know how long that takes.
        """
        if self.saver.has_failed:
            return True
        if self.countdown and not self.has_saved and self.countdown.timing.share >= FIRST_SAVE:
            return True
        minutes = self.run.train.save_minutes
        return minutes is not None and time.monotonic() - self.last_saved >= SECONDS_PER_MINUTE * minutes

    def open(self, state: State) -> None:
        """Bring the folder up to the present step, before the next one.

        Examines the slope on weights that were saved unexamined, writes a missing milestone, and, if no step is left,
        the last checkpoint. Raises Stopped if a rank was asked to stop meanwhile: there is nothing to save.
        """
        for signal_number in agreement.gather_results(signals.poll):
            if signal_number:
                raise signals.Stopped(signal_number)
        if 0 < state.step <= self.first_saved_step:
            self.examine(state)
        if state.step not in checkpoint.milestones(self.folder / "milestones"):
            self.mark(state)
        if state.is_over(self.run.train):  # there is nothing to do but to keep no more than is asked
            self.note_steps(state)
            self.save(state)
            self.saver.wait()

    def log(self, state: State, record: Record) -> None:
        """Judge the run where that is due, and add a row to the log where one is.

        A row is due every `log_every` steps, and at a step that was probed, judged or skipped, or at which a burst
        begins. `tell` is called with a line on a skipped step, and on a burst.
        """
        scores = self.judge(state)
        scheduled = state.step % self.run.train.log_every == 0
        time_slope = slope_in_time(state) if scheduled else None
        if not dist.is_main():
            return
        if record.burst:
            module_name = next(iter(record.burst))
            embeds = embedders(state.net).issuperset(state.modules[module_name])
            self.tell(burst_text(self.run.train, self.folder, self.checkpoints, record, embeds=embeds))
        if scheduled or record.skipped or record.burst or record.probe or scores:
            row = record.row()
            if time_slope is not None:
                row["time_slope"] = time_slope
            if scores:
                row["val"] = scores
            if record.skipped:
                blamed_rows = self.blamed_rows(record.step, record.skipped)
                row["skipped"]["rows"] = blamed_rows
                message = f"step {record.step:,} is skipped: {record.skipped}"
                if blamed_rows:
                    message += ": " + "; ".join(map(_row_text, blamed_rows[:3]))
                self.tell(message)
            log.append(self.folder / LOG_FILE, row)

    def judge(self, state: State) -> "Scores":
        """The scores of this step; {} where none are due. Every rank must call it."""
        if self.validation is None or state.step % self.validation.every:
            return {}
        began = self.countdown.seconds() if self.countdown else 0.0
        scores = self.validation.judge(state)
        if self.countdown:
            self.countdown.note(JUDGE, began)
        return scores

    def blamed_rows(self, step: int, skipped: Skipped) -> list[dict[str, Any]]:
        """The rows to blame for a skipped step, each with its number in the data set, not in the batch."""
        if not skipped.rows:
            return []
        train = self.run.train
        numbers = self.source.numbers(step - 1, train.batch, train.seed)
        rows: list[dict[str, Any]] = []
        for batch_row in skipped.rows:
            row: dict[str, Any] = {key: value for key, value in batch_row.items() if key != "place"}
            row["image"] = None if numbers is None else int(numbers[int(batch_row["place"] or 0)])
            rows.append(row)
        return rows

    def mark(self, state: State, record: Record | None = None) -> None:
        """Write the sampled weights at a milestone, and averages by a power where a snapshot is due."""
        if state.step in self.run.train.milestones:
            checkpoint.mark(self.folder / "milestones", state, identity(self.run))
        if self.run.train.is_snapshot_due(state.step, is_last=state.is_over(self.run.train)):
            from dumo.run import average

            average.save_snapshots(self.folder, state, identity(self.run))

    def keep(self, state: State, record: Record) -> None:
        """Save a checkpoint where one is due by step or clock, where the run is asked to stop, and at the end.

        Up to the first one the weights are examined before, but not where somebody waits for the run to stop.
        """
        is_asked_to_stop = record.asked is not None
        is_last = state.is_over(self.run.train)
        if is_asked_to_stop or record.due or state.step % self.first_saved_step == 0 or is_last:
            self.saver.wait()
            is_known = self.countdown is not None and self.is_examined  # once is enough where time is short
            if state.step <= self.first_saved_step and not is_asked_to_stop and not is_known:
                self.examine(state)
            if is_last:
                self.note_steps(state)
            self.save(state)
            if is_asked_to_stop or is_last:
                self.saver.wait()

    def save(self, state: State) -> None:
        """Save a checkpoint of this step in a thread, after the log up to it; training goes on meanwhile."""
        self.saver.wait()  # its memory is filled anew
        began = self.countdown.seconds() if self.countdown else 0.0
        log_file = self.folder / LOG_FILE
        step = state.step
        logged = agreement.on_each_rank(lambda: log.entry_of(log_file) if dist.is_main() else None)
        step_threads = self.threads.number if self.threads else None
        notes = checkpoint.Notes(self.text, datacheck.tensors_to_save(self.hashes), logged, step_threads)
        copy = checkpoint.copy(state, notes, self.saver.memory)

        def write() -> None:
            agreement.on_main_rank(self.restore_run_file)
            agreement.on_main_rank(lambda: log.flush(log_file))
            checkpoint.put(self.checkpoints, copy, self.run.train.keep)
            agreement.on_main_rank(lambda: mark_checkpoint_written(self.folder))
            best_folder = self.best_folder
            if best_folder:
                agreement.on_main_rank(lambda: best_folder.remove_older(step))
            if self.countdown:
                self.countdown.note(SAVE, began)

        self.saver.start(write)
        self.has_saved = True
        self.last_saved = time.monotonic()

    def note_steps(self, state: State) -> None:
        """Write into run.yaml, and into the checkpoints to come, how many steps a run made that ends by the clock."""
        train = self.run.train
        if state.timing is None or train.steps == state.step:
            return
        self.run = self.run.model_copy(update={"train": train.model_copy(update={"steps": state.step})})
        agreement.on_main_rank(lambda: write_run_file(self.run, self.folder, self.changed or ()))

    def restore_run_file(self) -> None:
        """Write run.yaml again where it was removed, and say so: a checkpoint is of no use without it.

        Raises UserError where the run's folder is no longer in its place.
        """
        if restore_run_file(self.folder, self.text):
            self.tell(f"warning: {self.folder / RUN_FILE} was removed during training, and is written again")

    def examine(self, state: State) -> None:
        """Raise UserError if the slope is not the derivative at the weights in training.

        Where the device has no room for the weights in training and what is copied of them, it is not examined, and
        `tell` is called with a line. Then the self-test of two blocks has to do.
        """
        net_outline = outline(self.run)
        copies_bytes = weight_bytes(net_outline) + float64.copied_bytes(net_outline)
        if dist.world() > 1:
            copies_bytes += weight_bytes(net_outline)  # ranks may share them: each examines them in one piece
        device_bytes = agreement.on_main_rank(lambda: total_memory(self.device))
        if self.run.objective.needs.slope and copies_bytes > device_bytes:
            self.tell(
                f"the slope is not examined on the weights in training: copies of them take {bytes_text(copies_bytes)} "
                f"of memory, and {self.device} has {bytes_text(device_bytes)}"
            )
            return
        with low_memory_heap():
            net = layout.gathered(state.net, partial(build, self.run))
            examination.examine_weights(self.run, net, self.device).require()
            self.is_examined = True
            del net
            gc.collect()  # hooks of its copy in float64 hold the net and themselves


def _row_text(row: dict[str, Any]) -> str:
    """A row of a batch in words."""
    parts: list[str] = []
    if row["image"] is not None:
        parts.append(f"image {row['image']}")
    if dist.world() > 1:
        parts.append(f"rank {row['rank']}")
    parts.append(f"t {row['t']:.3f}")
    return ", ".join(parts)


def slope_in_time(state: State) -> float | None:
    """The slope of the net's embedding of time (`Scalars.slope`); None if it has none. Every rank must call it."""
    for module in state.net.modules():
        if isinstance(module, Scalars) and "t" in module.names:
            return module.slope({name: layout.whole(weight.detach()) for name, weight in module.named_parameters()})
    return None


def burst_text(train: Train, folder: Path, checkpoints: Checkpoints, record: Record, *, embeds: bool = False) -> str:
    """The warning that a burst begins: in which module, and what to type before it breaks the training.

    `embeds`: whether that module is an embedder of times.
    """
    name, factor = next(iter(record.burst.items()))
    warning = (
        f"warning: step {record.step:,}: the gradient norm of {name} is {record.grad_norms[name]:.3g}, {factor:.2g} "
        f"times its median of the last {WINDOW} steps: the training may break here."
    )
    step = checkpoints.last_good(record.step - BURST_STEPS)
    if step is None:
        return f"{warning} No checkpoint is older: if u or v grow, stop it, and begin another run at a lower rate"
    if embeds and isinstance(train.optimizer, Muon):
        lower_rate = "an eighth of its rate"
        rates = {"time_lr": train.optimizer.embedders_lr / CALM}
    else:
        lower_rate = "half the rate"
        rates = half_rates(train.optimizer)
    return (
        f"{warning} If the loss's parts grow, stop it, and go on from step {step:,} at {lower_rate}:  "
        f"{_command_at_rates(folder, step, rates)}"
    )


def resume_hint(train: Train, folder: Path, checkpoints: Checkpoints, step: int) -> str:
    """How to resume from the last good checkpoint up to a step, or else from the start, at half the rate."""
    good_step = checkpoints.last_good(step)
    place = "from the start" if good_step is None else "from its last good checkpoint"
    command = _command_at_rates(folder, good_step, half_rates(train.optimizer))
    return f"To go on {place} at half the rate:  {command}"


def _command_at_rates(folder: Path, step: int | None, rates: Mapping[str, float]) -> str:
    """The call that goes on at these rates, from the checkpoint of `step`; None: as the folder stands."""
    fields = [f"train.optimizer.{name}={rate:g}" for name, rate in rates.items()]
    return train_call(folder, fields, step=step, program=join(_program_words()))


def _program_words() -> list[str]:
    """How this program was started, in words for a shell."""
    if dist.world() == 1:
        return ["dumo"]
    ranks_per_node = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return ["torchrun", "--nproc-per-node", ranks_per_node, "-m", "dumo"]


def _schedule_lines(train_before: Train, steps: int, steps_done: int) -> Iterator[str]:
    """Yield a line if the steps already done had other rates, because their schedule had another length."""
    if train_before.minutes is None and train_before.had_other_rates(steps, steps_done):
        length = "shorter" if train_before.steps < steps else "longer"
        yield (
            f"train.steps is {steps:,}, and was {train_before.steps:,}: the {steps_done:,} steps already done had the "
            f"rates of the {length} {train_before.schedule.kind} schedule"
        )


@dataclass(frozen=True)
class History:
    """What has changed in a folder's run when it goes on after `step`. Rank 0 alone makes and writes it."""

    run: Run
    index: Index
    source: DataSource
    step: int
    fingerprint: str | None  # of the data now
    changed: Sequence[Noted]
    versions: dict[str, str]  # that wrote the checkpoint
    train_before: Train | None  # how it was trained up to it; None: it begins
    logged: manifest.Listed | None = None  # the log up to it
    data_changed: bool = False

    @classmethod
    def of(
        cls,
        run: Run,
        index: Index,
        source: DataSource,
        step: int,
        last: Checkpoint | None,
        *,
        accept: bool = False,
        change: datacheck.Change | None = None,
    ) -> "History":
        """Compare run and data with what the folder holds; nothing is written.

        `last` is the checkpoint that is resumed, `change` how the contents of its data have changed. Raises UserError
        if the data have another fingerprint, and that is not accepted (`accept`).
        """
        # compare the data
        noted_fingerprint = index.data_note.fingerprint if index.data_note else None
        fingerprint = source.fingerprint()
        written = run_before_step(index, last)
        changed = written.changes_to_record(run, step) if written else []
        if last and noted_fingerprint is not None and noted_fingerprint != fingerprint:
            if not accept:
                raise datacheck.changed_data_error(
                    index.folder, f"fingerprint {noted_fingerprint} in {datanote.FILE}, {fingerprint} now"
                )
            change = datacheck.Change(noted_fingerprint, str(fingerprint))
        if change:
            changed = [*changed, Noted(step=step, field="data", was=change.was, now=change.now, accepted=True)]

        # look into the checkpoint
        return cls(
            run=run,
            index=index,
            source=source,
            step=step,
            fingerprint=fingerprint,
            changed=changed,
            versions=last.manifest.versions if last else {},
            train_before=written.run.train if written and last else None,
            logged=last.manifest.log if last else None,
            data_changed=change is not None,
        )

    def write(self, *, rewound: bool = False) -> Iterator[str]:
        """Bring the folder to `step`: rewind it, note run and data. Yields lines for the user.

        The log after the step is always moved aside; with `rewound`, later checkpoints and milestones are removed.
        """
        folder = self.index.folder
        log_file = folder / LOG_FILE

        # take back what came after the step
        has_log = log_file.exists()
        undone_rows = 0
        if has_log and (rewound or self.step == 0):
            undone_rows = sum(row["step"] > self.step for row in log.read_log(log_file))
        if self.step == 0 and undone_rows:
            yield (
                f"{folder} has no checkpoint, so it starts again from step 0; {undone_rows:,} rows of its log are "
                f"kept in {log.undone_rows_path(log_file)}"
            )
        if rewound:
            removed_steps: set[int] = set()
            for place in manifest.places(folder):
                removed_steps.update(manifest.rewind(place, self.step))
            if removed_steps:
                steps_text = ", ".join(f"{step:,}" for step in sorted(removed_steps))
                yield (
                    f"going on from step {self.step:,}: what came after it is removed, the checkpoints and milestones "
                    f"of steps {steps_text}"
                )
            if undone_rows:
                yield f"{undone_rows:,} rows of the log after it are kept in {log.undone_rows_path(log_file)}"
        rows = log.rewind(log_file, self.step) if has_log else []
        if self.step > 0:
            manifest.rewind(folder / BEST_FOLDER, self.step)
        else:
            best_aside = set_best_aside(folder)
            if best_aside:
                yield f"the best weights of before it starts again are kept in {best_aside}"

        # compare the log with what the checkpoint lists
        if self.logged is not None and self.logged != log.entry_of(log_file):
            yield f"{log_file} is not what was logged up to step {self.step:,}: weights do not depend on it, curves do"
        if rows:
            for first, last in log.gaps(rows, self.run.train.log_every):
                yield f"{log_file}: rows between steps {first:,} and {last:,} are lost; the run goes on without them"

        # note the run and its data
        write_run_file(self.run, folder, self.changed)
        if self.step == 0:
            mark_no_checkpoint_yet(folder)
        else:
            mark_checkpoint_written(folder)
        data_note = datanote.update(folder, self.index.data_note, self.source, self.fingerprint, anew=self.data_changed)

        # say what has changed
        for change in self.changed:
            if change.step == self.step:
                yield f"from step {self.step:,} on {change.field} is {shown(change.now)}, and was {shown(change.was)}"
        ends_by_steps = self.run.train.minutes is None
        if ends_by_steps and self.train_before and self.train_before.schedule == self.run.train.schedule:
            yield from _schedule_lines(self.train_before, self.run.train.steps, self.step)
        if self.versions:
            versions = software_versions()
            for name in PROGRAMS:
                version = versions[name]
                version_before = self.versions.get(name, version)
                if version_before != version:
                    yield (
                        f"{name} is {version}, and was {version_before} up to step {self.step:,}: numbers may round "
                        "otherwise"
                    )
        yield from advice(self.run, data_note.sd)
