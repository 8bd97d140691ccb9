"""The journal of a training: it writes log, milestones and checkpoints. Every rank has a `Journal`.

`run.train` creates it once `RunFolder.begin_at` has brought the folder to the step from which training resumes. It
calls `Journal.open` before the first step, and the training loop calls `Journal.hooks` after each step: log,
milestones, then checkpoints. `resume_hint` says what to type after a training that diverged.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dumo.autodiff import float64
from dumo.config.difference import config_hash
from dumo.config.spec import Run
from dumo.data.ledger import Ledger
from dumo.io.source import DataSource
from dumo.nets.embed import Scalars
from dumo.run import examination
from dumo.run.data import save_ledger
from dumo.run.folder import RunFolder
from dumo.run.memory import weight_bytes
from dumo.run.net import outline
from dumo.run.weights import build
from dumo.runtime import dist, shell_path, signals
from dumo.runtime.device import total_memory
from dumo.runtime.text import bytes_text
from dumo.training import agreement, layout, log, loop, milestone
from dumo.training.checkpoint import save_state
from dumo.training.duration import FIRST_SAVE_SHARE, SECONDS_PER_MINUTE, Clock
from dumo.training.optim import half_rates
from dumo.training.record import Record, Skipped
from dumo.training.spec import Train
from dumo.training.state import State

if TYPE_CHECKING:
    from dumo.run.teacher import TeacherPairs
    from dumo.run.validation import Scores, Validation


@dataclass
class Journal:
    """Writes log, milestones and checkpoints. Every rank must call each method alike."""

    run: Run
    folder: RunFolder
    device: torch.device
    source: "DataSource | TeacherPairs"
    tell: Callable[[str], None]
    # What the images were when they were read.
    ledger: Ledger | None = None
    # The clock of a run that ends by it.
    clock: Clock | None = None
    # Whether du/dt was examined on weights in training, and whether a checkpoint was saved.
    is_examined: bool = False
    has_saved: bool = False
    validation: "Validation | None" = None
    # Called with each row of the log, such as by a tracker.
    send_row: Callable[[log.Row], object] | None = None
    threads: int | None = None  # of torch on a CPU; None on a GPU
    # When the last checkpoint was taken, in seconds of the monotonic clock.
    last_saved: float = field(default_factory=time.monotonic)

    @property
    def hooks(self) -> tuple[loop.Every, ...]:
        """The hooks that the training loop calls after each step, in this order."""
        return loop.Every(1, self.log_step), loop.Every(1, self.write_milestone), loop.Every(1, self.save_if_due)

    def is_save_due(self) -> bool:
        """Whether a checkpoint is due by this rank's clock, or the last one could not be written.

        All ranks share a failure, so reporting it on rank 0 brings all of them to the save that raises it. A run that
        ends by the clock saves its first checkpoint early, to measure how long that takes.
        """
        if self.folder.checkpoints.has_failed:
            return True
        if self.clock and not self.has_saved and self.clock.timing.share >= FIRST_SAVE_SHARE:
            return True
        minutes = self.run.train.save_minutes
        return minutes is not None and time.monotonic() - self.last_saved >= SECONDS_PER_MINUTE * minutes

    def open(self, state: State) -> None:
        """Bring the folder up to the present step, before the next one.

        Examines du/dt on weights that were saved unexamined, writes a missing milestone and, if no step is left, the
        last checkpoint. Raises Stopped if a rank received a signal meanwhile: there is nothing to save.
        """
        for signal_number in agreement.gather_results(signals.poll):
            if signal_number:
                raise signals.Stopped(signal_number)
        if 0 < state.step <= self.run.train.first_saved_step:
            self.examine(state)
        if state.step not in milestone.milestones(self.folder.path / "milestones"):
            self.write_milestone(state)
        # Saving also removes checkpoints beyond the last `train.keep`.
        if state.is_over:
            self.save(state)
            self.folder.checkpoints.wait()

    def log_step(self, state: State, record: Record) -> None:
        """Evaluate the run if that is due, and add a row to the log if one is due.

        A row is due every `log_every` steps, and at a step that was evaluated or skipped. `tell` is called with a line
        for a skipped step.
        """
        scores = self.judge(state)
        scheduled = state.step % self.run.train.log_every == 0
        time_slope = slope_in_time(state) if scheduled else None
        if not dist.is_main():
            return
        if scheduled or record.skipped or scores:
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
            log.append(self.folder.log_file, row)
            if self.send_row:
                self.send_row(row)

    def judge(self, state: State) -> "Scores":
        """Evaluate the samples of this step; {} if that is not due. Every rank must call it."""
        if self.validation is None or state.step % self.validation.every:
            return {}
        return self.validation.judge(state)

    def blamed_rows(self, step: int, skipped: Skipped) -> list[dict[str, Any]]:
        """The rows to blame for a skipped step, with their numbers in the data set instead of the batch."""
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

    def write_milestone(self, state: State, record: Record | None = None) -> None:
        """Write the sampled weights at a milestone."""
        if state.step in self.run.train.milestones:
            milestone.save_milestone(self.folder.path / "milestones", state, config_hash(self.run))

    def save_if_due(self, state: State, record: Record) -> None:
        """Save a checkpoint if one is due by step or clock, after a signal, and at the end.

        Up to the first checkpoint that is due by its step (`Train.first_saved_step`), du/dt is examined on the weights
        before they are saved, but not after a signal, when somebody waits for the run to stop.
        """
        train = self.run.train
        is_due = record.due or state.step % train.save_every == 0
        is_last = state.is_over
        is_asked_to_stop = record.received_signal is not None
        if not (is_due or is_last or is_asked_to_stop):
            return
        self.folder.checkpoints.wait()
        # A run that ends by the clock examines du/dt only once.
        skips_examination = self.clock is not None and self.is_examined
        if state.step <= train.first_saved_step and not is_asked_to_stop and not skips_examination:
            self.examine(state)
        self.save(state)
        if is_asked_to_stop or is_last:
            self.folder.checkpoints.wait()

    def save(self, state: State) -> None:
        """Save a checkpoint of this step in a thread, after the log up to it, while training continues."""
        # The thread's copy of the last checkpoint is overwritten.
        self.folder.checkpoints.wait()
        began = self.clock.seconds() if self.clock else 0.0
        log_file = self.folder.log_file
        logged = agreement.on_each_rank(lambda: log.entry_of(log_file) if dist.is_main() else None)
        listed_ledger = save_ledger(self.folder.path, self.ledger)

        def finish() -> None:
            agreement.on_main_rank(self.folder.mark_checkpoint_written)
            agreement.on_main_rank(lambda: self.folder.remove_older_best(self.folder.checkpoints.steps()))
            if self.clock:
                self.clock.note_save(began)

        save_state(
            self.folder.checkpoints,
            state,
            self.folder.written_text,
            keep=self.run.train.keep,
            threads=self.threads,
            log=logged,
            ledger=listed_ledger,
            before=lambda: agreement.on_main_rank(lambda: log.flush(log_file)),
            after=finish,
        )
        self.has_saved = True
        self.last_saved = time.monotonic()

    def examine(self, state: State) -> None:
        """Raise UserError if the objective's du/dt is not the derivative at the weights in training.

        If the device has no room for copies of the weights, nothing is examined and `tell` is called with a line: only
        two blocks were examined then, before the first step.
        """
        if self.run.objective.needs.slope is None:
            return
        net_outline = outline(self.run)
        copies_bytes = weight_bytes(net_outline) + float64.copied_bytes(net_outline)
        if dist.world() > 1:
            # Ranks may share the weights, but each examines all of them.
            copies_bytes += weight_bytes(net_outline)
        device_bytes = agreement.on_main_rank(lambda: total_memory(self.device))
        if copies_bytes > device_bytes:
            self.tell(
                f"the slope is not examined on the weights in training: copies of them take {bytes_text(copies_bytes)} "
                f"of memory, and {self.device} has {bytes_text(device_bytes)}"
            )
            return
        net = layout.gather_net(state.net, partial(build, self.run))
        examination.examine_weights(self.run, net, self.device).require()
        self.is_examined = True
        # The hooks of the copy in float64 are in reference cycles, which hold the network.
        del net
        gc.collect()


def _row_text(row: dict[str, Any]) -> str:
    """Describe a row of a batch."""
    parts: list[str] = []
    if row["image"] is not None:
        parts.append(f"image {row['image']}")
    if dist.world() > 1:
        parts.append(f"rank {row['rank']}")
    parts.append(f"t {row['t']:.3f}")
    return ", ".join(parts)


def slope_in_time(state: State) -> float | None:
    """The slope of the time embedding (`Scalars.slope`); None if there is none. Every rank must call it."""
    for module in state.net.modules():
        if isinstance(module, Scalars) and "t" in module.names:
            weights = {name: layout.full_tensor(weight.detach()) for name, weight in module.named_parameters()}
            return module.slope(weights)
    return None


def resume_hint(train: Train, folder: RunFolder, step: int) -> str:
    """Say how to begin a new run from the last good checkpoint up to a step, or anew, at half the learning rate."""
    good_step = folder.checkpoints.last_good(step)
    place = "To begin anew" if good_step is None else "To begin a new run from the last good checkpoint"
    command = f"dumo train {shell_path(folder.path)}"
    if good_step is not None:
        command += f" --from {good_step}"
    command += " --out NEW"
    for name, rate in half_rates(train.optimizer).items():
        command += f" --set train.optimizer.{name}={rate:g}"
    return f"{place} at half the learning rate:  {command}"
