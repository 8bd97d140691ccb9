"""A run judged while it trains: the first score of a few samples of the sampled weights, by the run's protocol.

`Validation` opens what it needs before the first step; the journal calls `judge` after each step, and `tidy` after each
checkpoint; `outcome` says at the end which weights were the best.

Nothing of the training depends on it, to the bit: samples have streams of their own (`dumo.runtime.random`), and the
net its mode back. What is judged is opened once, before the first step. Ranks make the samples together, as sheets.
Of the scores so far the best may be kept, in best/; what a stop undid is forgotten, so that a run that is resumed keeps
the same.
"""

from collections.abc import Callable, Iterator, Set
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.config.load import identity
from dumo.config.spec import Run
from dumo.evaluation.metric import rising
from dumo.evaluation.protocol import Scores
from dumo.flow.precision import product_precision
from dumo.run.folder import BEST
from dumo.run.provenance import require_place
from dumo.run.sampler import rank_indices, sampler_of
from dumo.run.speed import LOG
from dumo.runtime import signals
from dumo.runtime.stopwatch import wall_clock
from dumo.training import agreement, checkpoint, layout, log, manifest
from dumo.training.state import State
from dumo.types import UserError

KIND = "best weights"  # of a file of weights
SCORE = "score"  # among the facts of such weights


class Validation:
    """Judges every `evaluate.every` steps, which is not 0; opens nothing where no such step is left."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        state: State,
        tell: Callable[[str], object],
        leave_out: Callable[[float], object] = lambda seconds: None,
        identities: Set[str] = frozenset(),
    ) -> None:
        """Open the protocol and its data; nothing is written. Every rank must call it.

        `tell` is called with a line for each score, `leave_out` with the seconds that it took.

        `identities` are those of the run in its folder (`Written.identities`), whose best weights may be there.

        Raises UserError as the protocol does, with how to train without it.
        """
        self.run = run
        self.folder = folder / BEST
        self.spec = run.evaluate.validation
        self.tell = tell
        self.leave_out = leave_out
        self.identities = {*identities, identity(run)}
        self.every = run.evaluate.every
        if state.step // self.every == run.train.steps // self.every:
            self.every = 0  # no such step is left
            return
        from dumo.run.judge import evaluator_of, sample_conditions  # nobody else needs them in training
        from dumo.runtime.progress import no_bar

        self.sampler = sampler_of(run, state.shown)
        try:
            self.c = agreement.on_each_rank(lambda: sample_conditions(run.data, self.spec))
            self.evaluator = agreement.on_each_rank(lambda: evaluator_of(self.sampler, self.spec, no_bar))
            agreement.on_each_rank(self.open_codec)
        except UserError as error:
            raise UserError(f"evaluate.every = {self.every}: {error}; or train without it, evaluate.every=0") from error
        agreement.on_main_rank(lambda: self.require_own_best(state.step))

    def open_codec(self) -> None:
        """Load the codec now, not at the first score. Raises UserError where its weights are missing or others."""
        _ = self.sampler.codec

    def require_own_best(self, step: int) -> None:
        """Raise UserError where the best weights up to a step are not what this run wrote."""
        self.best(step)

    def judge(self, state: State) -> Scores:
        """The first score and, where it has one, its `_sd`; none where none is due. Every rank must call it.

        It is finished where the run is asked to stop, for only this step can make it. Where samples cannot be judged,
        as of weights that have diverged, `tell` hears why.
        """
        if not self.every or state.step % self.every:
            return {}
        started = wall_clock()  # that of `speed.Meter`, which leaves these seconds out
        try:
            with (
                signals.finished(),
                torch.compiler.set_stance("force_eager"),
                product_precision("fp32", self.sampler.device),
            ):
                all_scores = self.evaluator.score(self.samples())
        except UserError as error:
            self.tell(f"warning: step {state.step:,} is not judged: {error}")
            return {}
        finally:
            layout.release(self.sampler.net)
            self.leave_out(wall_clock() - started)
        first = next(iter(all_scores))
        scores = {name: all_scores[name] for name in (first, f"{first}_sd") if name in all_scores}
        score_text = " ± ".join(f"{value:.3g}" for value in scores.values())
        self.tell(f"step {state.step:,}: {first} {score_text}")
        if self.run.evaluate.best:
            self.keep_if_best(state, first, scores[first])
        return scores

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's samples with their numbers, decoded."""
        count = len(self.c)
        indices = rank_indices(count)
        c = self.c[torch.arange(indices.stop) % count]
        for part in self.sampler.batches(c, nfe=self.spec.nfe[0], seed=self.spec.seed, indices=indices):
            is_asked_for = part.index < count
            yield part.index[is_asked_for], part.x[is_asked_for]

    def keep_if_best(self, state: State, name: str, score: float) -> None:
        """Write the sampled weights if their score is the best of those judged alike, as `checkpoint.save_weights`."""
        about = {"protocol": self.spec.protocol.name, "nfe": self.spec.nfe[0], "name": name}
        best_before = agreement.on_main_rank(lambda: self.best()[1])
        if not isfinite(score):
            return
        was_judged_alike = about.items() <= best_before.items()
        if was_judged_alike:
            is_better = score > best_before["value"] if rising(name) else score < best_before["value"]
            if not is_better:
                return
        facts = {SCORE: {**about, "value": score}}
        checkpoint.save_weights(self.folder, state, state.shown, KIND, identity(self.run), **facts)

    def best(self, last: int | None = None) -> tuple[Path | None, dict[str, Any]]:
        """The newest file of best weights, up to step `last`, and its score with what it is of; none and {} without.

        Raises UserError where the file is not what this run wrote there.
        """
        files = manifest.paths_by_step(self.folder, ".safetensors")
        steps = [step for step in files if last is None or step <= last]
        if not steps:
            return None, {}
        file = files[steps[-1]]
        require_place(file, self.identities, KIND, steps[-1])
        facts = checkpoint.facts_of(file)
        score = facts.get(SCORE, {})
        if score and checkpoint.FACTS_SUM not in facts:
            self.require_logged(file, steps[-1], score)
        return file, score

    def require_logged(self, file: Path, step: int, score: dict[str, Any]) -> None:
        """Raise UserError unless the log has the score of weights from before scores were under a checksum."""
        rows = log.read_log(self.folder.parent / LOG)
        name = score.get("name")
        value = score.get("value")
        if not any(row["step"] == step and row.get("val", {}).get(name) == value for row in rows):
            raise UserError(
                f"{file} says that its {name} is {value}, and {LOG} has no such row of step {step}: "
                "put back the one that this run kept, or remove it"
            )

    def tidy(self, step: int) -> None:
        """Remove all best weights up to `step` but the last, once the checkpoint of that step is written.

        No resumed run goes back behind that checkpoint. Weights that have become the best since stay: a resumed run
        removes them.
        """
        files = manifest.paths_by_step(self.folder, ".safetensors")
        up_to_step = [path for file_step, path in files.items() if file_step <= step]
        for path in up_to_step[:-1]:
            path.unlink()

    def outcome(self) -> Iterator[str]:
        """Which weights were the best, in a line."""
        if not self.run.evaluate.best:
            return
        file, score = self.best()
        if file and score:
            step = checkpoint.step_of(file, 0)
            yield f"the best {score['name']} in training, {score['value']:.4g}, is of step {step:,}: {file}"
