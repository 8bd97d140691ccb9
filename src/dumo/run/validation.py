"""A run judged while it trains: the leading score of a few samples of the sampled weights, by the run's protocol.

`Validation.open` opens what it needs before the first step. The journal calls `judge` after each step; every
`evaluate.every` steps it makes samples, scores them, writes a line, and lets `RunFolder` keep the best weights.

Random streams are separate (`dumo.runtime.random`), and the net's mode is restored, so training is bit-identical with
or without it. Ranks share the sampling.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dumo.config.spec import Run
from dumo.evaluation.protocol import Evaluator, Scores
from dumo.flow.precision import product_precision
from dumo.run.folder import RunFolder
from dumo.run.sampler import Sampler, rank_indices, sampler_of
from dumo.runtime import signals
from dumo.runtime.stopwatch import wall_clock
from dumo.training import agreement
from dumo.training.state import State
from dumo.types import Cond, UserError


class Validation:
    """Judges a run every `evaluate.every` steps. `open` makes it."""

    def __init__(
        self,
        run: Run,
        *,
        sampler: Sampler,
        evaluator: Evaluator,
        conditions: Cond,
        folder: RunFolder,
        log_line: Callable[[str], object],
        exclude_seconds: Callable[[float], object],
    ) -> None:
        """`conditions` (n, ...) are those of the samples that are judged. For the others see `open`."""
        self.every = run.evaluate.every
        self.keeps_best = run.evaluate.best
        self.settings = run.evaluate.validation
        self.sampler = sampler
        self.evaluator = evaluator
        self.conditions = conditions
        self.run = run
        self.folder = folder
        self.log_line = log_line
        self.exclude_seconds = exclude_seconds

    @classmethod
    def open(
        cls,
        run: Run,
        state: State,
        folder: RunFolder,
        *,
        log_line: Callable[[str], object],
        exclude_seconds: Callable[[float], object],
    ) -> "Validation | None":
        """Open the protocol and its data; nothing is written. None: no step is left that is judged.

        `log_line` is called with a line for each score, `exclude_seconds` with the seconds that it took, which are no
        time of training. Every rank must call it.

        Raises UserError if the protocol or the codec cannot be opened, or the best weights of the folder up to this
        step are not what this run wrote.
        """
        every = run.evaluate.every
        if state.is_over:
            return None
        if state.duration.timing is None and state.step // every == run.train.steps // every:
            return None
        from dumo.run.judge import evaluator_of, sample_conditions  # nobody else needs them in training
        from dumo.runtime.progress import no_bar

        settings = run.evaluate.validation
        sampler = sampler_of(run, state.sampled_net)
        conditions = agreement.on_each_rank(lambda: sample_conditions(run.data, settings))
        evaluator = agreement.on_each_rank(lambda: evaluator_of(sampler, settings, no_bar))
        agreement.on_each_rank(lambda: sampler.codec)  # loaded now, because its weights may be missing
        agreement.on_main_rank(lambda: folder.find_best(run, state.step))
        return cls(
            run,
            sampler=sampler,
            evaluator=evaluator,
            conditions=conditions,
            folder=folder,
            log_line=log_line,
            exclude_seconds=exclude_seconds,
        )

    def judge(self, state: State) -> Scores:
        """The leading score and, if it has one, its `_sd`. Every rank must call it.

        {} where no score is due, and where samples cannot be judged, as of weights that have diverged: then a warning
        says why.
        """
        if state.step % self.every:
            return {}
        scores = self._score(state)
        if not scores:
            return {}
        leading_metric = next(iter(scores))
        score_text = " ± ".join(f"{value:.3g}" for value in scores.values())
        self.log_line(f"step {state.step:,}: {leading_metric} {score_text}")
        if self.keeps_best:
            self.folder.save_if_best(
                self.run,
                state,
                metric=leading_metric,
                value=scores[leading_metric],
                protocol=self.settings.protocol.name,
                nfe=self.settings.nfe[0],
            )
        return scores

    def _score(self, state: State) -> Scores:
        """Make samples and score them. A stop that is asked for meanwhile waits: only this step can make this score."""
        started = wall_clock()  # that of `speed.Meter`, which excludes these seconds
        try:
            with (
                signals.uninterrupted(),
                torch.compiler.set_stance("force_eager"),
                product_precision("fp32", self.sampler.device),
            ):
                all_scores = self.evaluator.score(self.samples())
        except UserError as error:
            self.log_line(f"warning: step {state.step:,} is not judged: {error}")
            return {}
        finally:
            self.exclude_seconds(wall_clock() - started)
        leading_metric = next(iter(all_scores))
        scores = {leading_metric: all_scores[leading_metric]}
        error_name = f"{leading_metric}_sd"
        if error_name in all_scores:
            scores[error_name] = all_scores[error_name]
        return scores

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's samples with their numbers, decoded."""
        num_samples = len(self.conditions)
        indices = rank_indices(num_samples)
        # every rank makes as many, so the numbers may run past the last sample
        conditions = self.conditions[torch.arange(indices.stop) % num_samples]
        batches = self.sampler.batches(conditions, nfe=self.settings.nfe[0], seed=self.settings.seed, indices=indices)
        for batch in batches:
            is_judged = batch.index < num_samples
            yield batch.index[is_judged], batch.x[is_judged]
