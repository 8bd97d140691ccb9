"""Validation during training: score a few samples by the run's evaluation protocol.

`Validation.open` opens the protocol and its data before the first step. Every `evaluate.every` steps the hook generates
samples from the averaged weights on all ranks, scores them, prints a line, and lets `RunFolder` keep the best weights.

Random streams are separate (`dumo.runtime.random`) and the net's mode is restored, so training is bit-identical with
and without validation.
"""

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dumo.evaluation.protocol import Evaluator, Scores
from dumo.flow import sampling
from dumo.flow.precision import product_precision
from dumo.run.hooks import Hook
from dumo.run.judge import evaluator_of, sample_conditions
from dumo.run.trained import TrainedRun
from dumo.runtime import signals
from dumo.runtime.progress import no_bar
from dumo.runtime.stopwatch import wall_clock
from dumo.training import agreement
from dumo.training.metrics import StepMetrics
from dumo.types import Cond, UserError

if TYPE_CHECKING:
    from dumo.run.trainer import Trainer


class Validation(Hook):
    """Scores a run every `evaluate.every` steps and keeps its best weights. Create it with `open`."""

    def __init__(self, trainer: "Trainer", *, trained: TrainedRun, evaluator: Evaluator, conditions: Cond) -> None:
        """Take the conditions (n, ...) of the samples to score, and what `open` opened."""
        self.trainer = trainer
        self.settings = trainer.run.evaluate.validation
        self.trained = trained
        self.evaluator = evaluator
        self.conditions = conditions
        # The leading score of the last step, with its `_sd` if available; {} if the step was not scored.
        self.scores: Scores = {}

    @classmethod
    def open(cls, trainer: "Trainer") -> "Validation | None":
        """Open the protocol and its data without writing anything. Return None if no remaining step is scored.

        Every rank must call it. Raise UserError if the protocol or the codec cannot be opened, or if this run did not
        write the best weights in the folder.
        """
        run = trainer.run
        state = trainer.state
        every = run.evaluate.every
        if not every or state.is_over:
            return None
        if state.duration.timing is None and state.step // every == run.train.steps // every:
            return None
        settings = run.evaluate.validation
        trained = TrainedRun(run, trainer.folder, state.sampled_net, state.step)
        conditions = agreement.on_each_rank(lambda: sample_conditions(run.data, settings))
        evaluator = agreement.on_each_rank(lambda: evaluator_of(run, settings, trained.device, no_bar))
        # Load the codec now, so that missing weights fail before training.
        agreement.on_each_rank(lambda: trained.codec)
        agreement.on_main_rank(lambda: trainer.folder.find_best(run, state.step))
        return cls(trainer, trained=trained, evaluator=evaluator, conditions=conditions)

    def after_step(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Score the weights if validation is due after this step, and keep them if they are the best.

        If the samples cannot be scored, for example after divergence, print a warning and continue without a score.
        """
        self.scores = {}
        if metrics.step % trainer.run.evaluate.every:
            return
        self.scores = self._score(metrics.step)
        if not self.scores:
            return
        leading_metric = next(iter(self.scores))
        score_text = " ± ".join(f"{value:.3g}" for value in self.scores.values())
        trainer.print_line(f"step {metrics.step:,}: {leading_metric} {score_text}")
        if trainer.run.evaluate.best:
            trainer.folder.save_if_best(
                trainer.run,
                trainer.state,
                metric=leading_metric,
                value=self.scores[leading_metric],
                protocol=self.settings.protocol.name,
                nfe=self.settings.nfe[0],
            )

    def after_training(self, trainer: "Trainer") -> None:
        """Print the best score and its weights file."""
        if not trainer.run.evaluate.best:
            return
        best = agreement.on_main_rank(lambda: trainer.folder.find_best(trainer.run))
        if best:
            trainer.print_line(
                f"the best {best.metric} in training, {best.value:.4g}, is of step {best.step:,}: {best.file}"
            )

    def _score(self, step: int) -> Scores:
        """Generate samples and score them. Signals wait until the end, because the score cannot be computed later."""
        # Exclude this time from the training speed, with the clock of `speed.Meter`.
        started = wall_clock()
        samples = self.samples()
        try:
            with (
                signals.uninterrupted(),
                torch.compiler.set_stance("force_eager"),
                product_precision("fp32", self.trained.device),
            ):
                try:
                    all_scores = self.evaluator.score(samples)
                except BaseException as error:
                    # Raise the error on the other ranks, which wait for this rank's next batch.
                    samples.throw(error)
                    raise
        except UserError as error:
            self.trainer.print_line(f"warning: step {step:,} is not judged: {error}")
            return {}
        finally:
            self.trainer.show_progress.meter.leave_out(wall_clock() - started)
        leading_metric = next(iter(all_scores))
        scores = {leading_metric: all_scores[leading_metric]}
        error_name = f"{leading_metric}_sd"
        if error_name in all_scores:
            scores[error_name] = all_scores[error_name]
        return scores

    def samples(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield this rank's decoded samples with their indices.

        Ranks synchronize at each batch and after the last one. An error on one rank, in generating a batch or thrown
        into this generator while scoring one, is therefore raised on all ranks.
        """
        batches = self.trained.make_batches(self.conditions, nfe=self.settings.nfe[0], seed=self.settings.seed)
        batch: sampling.Batch | None = None

        def make_batch() -> bool:
            nonlocal batch
            batch = next(batches, None)
            return batch is not None

        while any(agreement.gather_results(make_batch)):
            if batch is None:
                continue
            try:
                yield batch.index, batch.x
            except BaseException as error:
                agreement.gather_results(partial(_raise, error))


def _raise(error: BaseException) -> None:
    """Raise an error, on the rank where it occurred."""
    raise error
