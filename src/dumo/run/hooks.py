"""Training hooks: progress, validation, the log, checkpoints and sheets of samples.

`Trainer` calls every hook before the first step, after each step, and after the last step, in this order:

1. `ShowProgress` shows the step before slower hooks run, and writes speed.jsonl.
2. `Validation` (`dumo.run.validation`): the log row includes its score, and the best weights must exist before the
   checkpoint, because a run that resumes at this step does not score it again.
3. `WriteLog`: a checkpoint lists the size and digest of the log, including this row.
4. `SaveMilestones`.
5. `SaveCheckpoints`, after all work of this step that a resumed run does not repeat.
6. `RenderSheets` (`dumo.run.sheet`): slow, and repeated by a resumed run. A thread writes the checkpoint meanwhile.
7. Further hooks, such as a tracker (`dumo.report.tracker`) and the callbacks of `dumo.train`.

Every rank has the same hooks and calls the same methods. A hook must branch only on values that are equal on all ranks:
a rank that skips a collective operation would block the other ranks.
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
    """Base class of hooks. Subclasses override the methods that they need."""

    def before_training(self, trainer: "Trainer") -> None:
        """Called once, before the first step."""

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Called after each step with its metrics; `trainer.state` is the state after the step."""

    def after_training(self, trainer: "Trainer") -> None:
        """Called once after the last step, but not after an error."""


class ShowProgress(Hook):
    """Updates the progress bar after each step, and writes speed.jsonl."""

    def __init__(self, trainer: "Trainer") -> None:
        run = trainer.run
        step_flops = None
        if known_peak_tflops(trainer.device):
            step_flops = step_cost(trainer.meta_net, run.objective, run.path, run.data.shape, ref=run.train.ref).flops
        self.meter = Meter(run.train, trainer.folder.path, trainer.device, step_flops)
        self.tick: Tick = lambda done, note: None

    @contextmanager
    def shown(self, trainer: "Trainer") -> Generator[None, None, None]:
        """Show the bar inside the context. It counts steps, or seconds if the run has a time limit."""
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
        """Measure the speed, and show it with the loss."""
        note = self.meter.note(metrics)
        if trainer.state.duration.timing:
            note = f"step {metrics.step:,}, {note}"
        self.tick(_units_done(trainer.state), note)


def _units_done(state: State) -> int:
    """Return the number of steps done, or the seconds of a run with a time limit."""
    timing = state.duration.timing
    return state.step if timing is None else round(timing.seconds)


class WriteLog(Hook):
    """Writes log rows every `log_every` steps, and for scored or skipped steps."""

    def __init__(self, validation: "Validation | None") -> None:
        """Take the validation hook, which is called before this one."""
        self.validation = validation
        # The row of the last step; None if no row was written, and on ranks other than 0.
        self.row: log.Row | None = None

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Write a log row if it is due, and print a line for a skipped step."""
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
    """Return the slope of the network's time embedding (`Scalars.slope`), or None. Every rank must call it."""
    for module in state.net.modules():
        if isinstance(module, Scalars) and "t" in module.names:
            weights = {name: layout.full_tensor(weight.detach()) for name, weight in module.named_parameters()}
            return module.slope(weights)
    return None


def _with_image_numbers(skipped: Skipped, trainer: "Trainer", step: int) -> list[dict[str, Any]]:
    """Return the bad rows of a skipped step, with data set indices instead of batch indices."""
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
    """Describe a bad row for the user."""
    words: list[str] = []
    if row["image"] is not None:
        words.append(f"image {row['image']}")
    if dist.world() > 1:
        words.append(f"rank {row['rank']}")
    words.append(f"t {row['t']:.3f}")
    return ", ".join(words)


class SaveMilestones(Hook):
    """Writes the sampled weights to milestones/ after the steps of `train.milestones`."""

    def before_training(self, trainer: "Trainer") -> None:
        """Write the milestone of the current step, such as step 0, if it is missing."""
        folder = trainer.folder.path / "milestones"
        # Only rank 0 looks for the file, because it may write it before a slower rank has looked.
        if agreement.on_main_rank(lambda: trainer.state.step not in milestone.milestones(folder)):
            self._save_if_due(trainer)

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Write a milestone if it is due."""
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: "Trainer") -> None:
        if trainer.state.step in trainer.config.milestones:
            folder = trainer.folder.path / "milestones"
            milestone.save_milestone(folder, trainer.state, config_hash(trainer.run))


class SaveCheckpoints(Hook):
    """Saves checkpoints at regular steps and times, after a signal, and at the end.

    Until the first regular step (`Train.first_saved_step`), du/dt is compared with the derivative at the current
    weights before they are saved.
    """

    def __init__(self, ledger: Ledger | None) -> None:
        """`ledger` records the hashes of images as they are read; None if the data are not images."""
        self.ledger = ledger
        self.is_slope_examined = False
        self.has_saved = False
        # The time of the last checkpoint, or of the start of training, in seconds of the monotonic clock.
        self.last_saved = time.monotonic()

    def is_due_by_clock(self, trainer: "Trainer") -> bool:
        """Whether a checkpoint is due by this rank's clock, or the last one could not be written.

        After a failed write the next save raises its error on all ranks. A run with a time limit saves its first
        checkpoint early, to measure the duration of a save.
        """
        if trainer.folder.checkpoints.has_failed:
            return True
        if trainer.clock and not self.has_saved and trainer.clock.timing.share >= FIRST_SAVE_SHARE:
            return True
        minutes = trainer.config.save_minutes
        return minutes is not None and time.monotonic() - self.last_saved >= SECONDS_PER_MINUTE * minutes

    def before_training(self, trainer: "Trainer") -> None:
        """Complete an interrupted run: examine du/dt, and save the final checkpoint if no step is left.

        Raise Stopped if a rank has already received a signal, because there is nothing to save.
        """
        self.last_saved = time.monotonic()
        for signal_number in agreement.gather_results(signals.poll):
            if signal_number:
                raise signals.Stopped(signal_number)
        if 0 < trainer.state.step <= trainer.config.first_saved_step:
            self._examine_slope(trainer)
        # Saving also removes all but the last `train.keep` checkpoints.
        if trainer.state.is_over:
            self._save(trainer)
            trainer.folder.checkpoints.wait()

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Save a checkpoint if it is due. After a signal and at the end, wait until it is written."""
        state = trainer.state
        is_asked_to_stop = metrics.received_signal is not None
        is_due = metrics.checkpoint_due or state.step % trainer.config.save_every == 0
        if not (is_due or state.is_over or is_asked_to_stop):
            return
        trainer.folder.checkpoints.wait()
        # Skip the examination after a signal, to stop soon, and after the first one of a run with a time limit.
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
        """Save a checkpoint of this step in a thread, after flushing the log, while training continues."""
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
