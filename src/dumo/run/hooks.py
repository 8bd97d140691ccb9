"""Hooks: the work around optimizer steps, such as progress, scores, the log, checkpoints and sheets of samples.

`Trainer` calls every hook before its first step, after each step, and after its last one, in this order:

1. `ShowProgress` shows the step before slower hooks run, and writes speed.jsonl.
2. `Validation` (`dumo.run.validation`): its score belongs to the row of the log, and its best weights must exist before
   the checkpoint, because a run that resumes at this step does not score it again.
3. `WriteLog`: a checkpoint lists the size and digest of the log, up to this row.
4. `SaveMilestones`.
5. `SaveCheckpoints`, after all work of this step that a resumed run would not repeat.
6. `RenderSheets` (`dumo.run.sheet`): slow, and redrawn by a resumed run. A thread writes the checkpoint meanwhile.
7. Further hooks, such as a tracker (`dumo.report.tracker`) and the callbacks of `dumo.train`.

Every rank has the same hooks and calls each method alike. A hook decides by values that all ranks agree on, because a
rank that returned before a collective operation would leave the others waiting.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dumo.config.difference import config_hash
from dumo.data.ledger import Ledger
from dumo.nets.embed import Scalars
from dumo.run import examination
from dumo.run.data import save_ledger
from dumo.run.flops import step_cost
from dumo.run.speed import Meter
from dumo.runtime import dist, signals
from dumo.runtime.device import known_peak_tflops
from dumo.runtime.progress import Tick
from dumo.training import agreement, layout, log, milestone
from dumo.training.duration import FIRST_SAVE_SHARE, SECONDS_PER_MINUTE
from dumo.training.metrics import Skipped, StepMetrics
from dumo.training.state import State

if TYPE_CHECKING:
    from dumo.run.trainer import Trainer
    from dumo.run.validation import Validation


class Hook:
    """Work around the steps of a training; a subclass overrides the methods that it needs."""

    def before_training(self, trainer: "Trainer") -> None:
        """Called once, before the first step."""

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Called after each step, with what it measured; `trainer.state` is the state after it."""

    def after_training(self, trainer: "Trainer") -> None:
        """Called once the last step is done, not after an error."""


class ShowProgress(Hook):
    """Moves a bar after each step, and adds rows to speed.jsonl."""

    def __init__(self, trainer: "Trainer") -> None:
        run = trainer.run
        step_flops = None
        if known_peak_tflops(trainer.device):
            step_flops = step_cost(trainer.meta_net, run.objective, run.path, run.data.shape, ref=run.train.ref).flops
        self.meter = Meter(run.train, trainer.folder.path, trainer.device, step_flops)
        self.tick: Tick = lambda done, note: None

    @contextmanager
    def shown(self, trainer: "Trainer") -> Generator[None, None, None]:
        """Show the bar while inside: it counts steps, or seconds of a run by the clock."""
        state = trainer.state
        timing = state.duration.timing
        title = f"training {trainer.folder.path.name}"
        total = state.duration.steps
        if timing:
            title += " (seconds)"
            total = round(timing.promised_seconds)
        first_note = "the first step"
        if state.is_over:
            first_note = "no step is left"
        elif trainer.config.compile != "none":
            first_note = "the first step, compiled first"
        with trainer.bar(title, total) as tick:
            tick(_units_done(state), first_note)
            self.tick = tick
            self.meter.begin(state.step)
            yield

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Measure the step, and show its loss and speed."""
        note = self.meter.note(metrics)
        if trainer.state.duration.timing:
            note = f"step {metrics.step:,}, {note}"
        self.tick(_units_done(trainer.state), note)


def _units_done(state: State) -> int:
    """The steps that are done, or the seconds of a run by the clock."""
    timing = state.duration.timing
    return state.step if timing is None else round(timing.seconds)


class WriteLog(Hook):
    """Adds rows to the log: every `log_every` steps, and at a step that was scored or skipped."""

    def __init__(self, validation: "Validation | None") -> None:
        """`validation` has scored the step, if it was due."""
        self.validation = validation
        # The row of the last step; None if it has none, and on ranks other than 0.
        self.row: log.Row | None = None

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Write the row of this step if one is due, and print a line for a skipped step."""
        self.row = None
        scores = self.validation.scores if self.validation else {}
        is_scheduled = metrics.step % trainer.config.log_every == 0
        time_slope = slope_of_time_embedding(trainer.state) if is_scheduled else None
        if not dist.is_main() or not (is_scheduled or metrics.skipped or scores):
            return
        row = metrics.row()
        if time_slope is not None:
            row["time_slope"] = time_slope
        if scores:
            row["val"] = scores
        if metrics.skipped:
            bad_rows = _with_image_numbers(metrics.skipped, trainer, metrics.step)
            row["skipped"]["rows"] = bad_rows
            line = f"step {metrics.step:,} is skipped: {metrics.skipped}"
            if bad_rows:
                line += ": " + "; ".join(map(_describe_row, bad_rows[:3]))
            trainer.print_line(line)
        log.append(trainer.folder.log_file, row)
        self.row = row


def slope_of_time_embedding(state: State) -> float | None:
    """The slope of the network's time embedding (`Scalars.slope`); None without one. Every rank must call it."""
    for module in state.net.modules():
        if isinstance(module, Scalars) and "t" in module.names:
            weights = {name: layout.full_tensor(weight.detach()) for name, weight in module.named_parameters()}
            return module.slope(weights)
    return None


def _with_image_numbers(skipped: Skipped, trainer: "Trainer", step: int) -> list[dict[str, Any]]:
    """The bad rows of a skipped step, with their numbers in the data set in place of those in the batch."""
    if not skipped.rows:
        return []
    numbers = trainer.source.numbers(step - 1, trainer.config.batch, trainer.config.seed)
    rows: list[dict[str, Any]] = []
    for batch_row in skipped.rows:
        row: dict[str, Any] = {key: value for key, value in batch_row.items() if key != "place"}
        row["image"] = None if numbers is None else int(numbers[int(batch_row["place"] or 0)])
        rows.append(row)
    return rows


def _describe_row(row: dict[str, Any]) -> str:
    """Describe a bad row in some words."""
    words: list[str] = []
    if row["image"] is not None:
        words.append(f"image {row['image']}")
    if dist.world() > 1:
        words.append(f"rank {row['rank']}")
    words.append(f"t {row['t']:.3f}")
    return ", ".join(words)


class SaveMilestones(Hook):
    """Writes the sampled weights after the steps of `train.milestones`, to milestones/."""

    def before_training(self, trainer: "Trainer") -> None:
        """Write a milestone of the present step that is missing, such as that of step 0."""
        folder = trainer.folder.path / "milestones"
        # Rank 0 looks for all: it may write before a slower rank has looked.
        if agreement.on_main_rank(lambda: trainer.state.step not in milestone.milestones(folder)):
            self._save_if_due(trainer)

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Write a milestone if this step is one."""
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: "Trainer") -> None:
        if trainer.state.step in trainer.config.milestones:
            folder = trainer.folder.path / "milestones"
            milestone.save_milestone(folder, trainer.state, config_hash(trainer.run))


class SaveCheckpoints(Hook):
    """Saves a checkpoint when one is due by step or clock, after a signal, and at the end.

    Up to the first checkpoint that is due by its step (`Train.first_saved_step`), du/dt is compared with the derivative
    at the weights before they are saved.
    """

    def __init__(self, ledger: Ledger | None) -> None:
        """`ledger` records what the images were when they were read; None: the data are no images."""
        self.ledger = ledger
        self.is_slope_examined = False
        self.has_saved = False
        # When training began or the last checkpoint was taken, in seconds of the monotonic clock.
        self.last_saved = time.monotonic()

    def is_due_by_clock(self, trainer: "Trainer") -> bool:
        """Whether a checkpoint is due by this rank's clock, or the last one could not be written.

        All ranks share a failure, so rank 0 brings all of them to the save that raises it. A run by the clock saves its
        first checkpoint early, to measure how long that takes.
        """
        if trainer.folder.checkpoints.has_failed:
            return True
        if trainer.clock and not self.has_saved and trainer.clock.timing.share >= FIRST_SAVE_SHARE:
            return True
        minutes = trainer.config.save_minutes
        return minutes is not None and time.monotonic() - self.last_saved >= SECONDS_PER_MINUTE * minutes

    def before_training(self, trainer: "Trainer") -> None:
        """Redo what an interrupted run missed: the comparison of du/dt, and the last checkpoint if no step is left.

        Raises Stopped if a rank has received a signal already: there is nothing to save.
        """
        self.last_saved = time.monotonic()
        for signal_number in agreement.gather_results(signals.poll):
            if signal_number:
                raise signals.Stopped(signal_number)
        if 0 < trainer.state.step <= trainer.config.first_saved_step:
            self._examine_slope(trainer)
        # Saving also removes checkpoints beyond the last `train.keep`.
        if trainer.state.is_over:
            self._save(trainer)
            trainer.folder.checkpoints.wait()

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Save a checkpoint if one is due. After a signal and at the end, wait until it is written."""
        state = trainer.state
        is_asked_to_stop = metrics.received_signal is not None
        is_due = metrics.checkpoint_due or state.step % trainer.config.save_every == 0
        if not (is_due or state.is_over or is_asked_to_stop):
            return
        trainer.folder.checkpoints.wait()
        # After a signal somebody waits for the run to stop. A run by the clock takes the time for it only once.
        skips_examination = is_asked_to_stop or (trainer.clock is not None and self.is_slope_examined)
        if state.step <= trainer.config.first_saved_step and not skips_examination:
            self._examine_slope(trainer)
        self._save(trainer)
        if is_asked_to_stop or state.is_over:
            trainer.folder.checkpoints.wait()

    def _examine_slope(self, trainer: "Trainer") -> None:
        is_examined = examination.examine_in_training(trainer.run, trainer.state, trainer.device, trainer.print_line)
        self.is_slope_examined = self.is_slope_examined or is_examined

    def _save(self, trainer: "Trainer") -> None:
        """Save a checkpoint of this step in a thread, after the log up to it, while training continues."""
        folder = trainer.folder
        clock = trainer.clock
        began = clock.seconds() if clock else 0.0
        logged = agreement.on_each_rank(lambda: log.entry_of(folder.log_file) if dist.is_main() else None)
        listed_ledger = save_ledger(folder.path, self.ledger)

        def after_writing() -> None:
            agreement.on_main_rank(folder.mark_checkpoint_written)
            agreement.on_main_rank(lambda: folder.remove_older_best(folder.checkpoints.steps()))
            if clock:
                clock.note_save(began)

        folder.checkpoints.save(
            trainer.state,
            folder.written_text,
            keep=trainer.config.keep,
            threads=trainer.threads,
            log=logged,
            ledger=listed_ledger,
            before=lambda: agreement.on_main_rank(lambda: log.flush(folder.log_file)),
            after=after_writing,
        )
        self.has_saved = True
        self.last_saved = time.monotonic()
