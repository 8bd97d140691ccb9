"""best/ in a run's folder: the sampled weights with the best score of the run's validation so far.

`BestFolder` owns the folder. In training, `Validation` calls `save_if_best` after each score, and the journal
`remove_older` after each checkpoint; `describe` is what is said at the end. `find_best` reads.

A file of weights says its score, and by which protocol and nfe it was measured: scores that were measured otherwise are
not compared. On resume, `run.history` drops weights newer than the checkpoint, so files from before it must stay: one
for each checkpoint from which a run may resume.
"""

from collections.abc import Collection, Set
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from dumo.config.difference import identity
from dumo.config.spec import Run
from dumo.evaluation.metric import higher_is_better
from dumo.run.folder import BEST_FOLDER
from dumo.run.provenance import require_own_file
from dumo.training import agreement, checkpoint, manifest
from dumo.training.state import State

KIND = "best weights"  # what the file of weights says it is
_SCORE = "score"  # the name of the score among the facts in the file


@dataclass(frozen=True)
class BestWeights:
    """A file in best/, and the score of its weights."""

    file: Path
    step: int
    metric: str
    value: float
    protocol: str  # the name of the protocol that measured it
    nfe: int  # of the samples that were judged


class BestFolder:
    """The best weights of a run in training."""

    def __init__(self, run: Run, run_folder: Path, identities: Set[str] = frozenset()) -> None:
        """Open nothing yet. `identities` are those of the run that the folder holds (`RecordedRun.identities`).

        Weights that were written under one of them, or under that of `run`, are this run's own.
        """
        self.run = run
        self.folder = run_folder / BEST_FOLDER
        self.identities = {*identities, identity(run)}

    def find_best(self, max_step: int | None = None) -> BestWeights | None:
        """The newest weights, up to step `max_step`; None if there are none.

        Raises UserError if the file is not what this run wrote there.
        """
        files = manifest.paths_by_step(self.folder, ".safetensors")
        steps = [step for step in files if max_step is None or step <= max_step]
        if not steps:
            return None
        step = steps[-1]
        file = files[step]
        require_own_file(file, self.identities, KIND, step)
        score = checkpoint.facts_of(file)[_SCORE]
        return BestWeights(file, step, score["name"], score["value"], score["protocol"], score["nfe"])

    def save_if_best(self, state: State, *, metric: str, value: float, protocol: str, nfe: int) -> None:
        """Write the sampled weights if their score is finite and the best of those that were measured alike.

        Every rank must call it, with the same score. Raises UserError as `find_best`, and if the disk is full.
        """
        # first of all, so that weights of another run are refused whatever the score is
        previous = agreement.on_main_rank(self.find_best)
        if not isfinite(value):
            return
        if previous and (previous.metric, previous.protocol, previous.nfe) == (metric, protocol, nfe):
            is_better = value > previous.value if higher_is_better(metric) else value < previous.value
            if not is_better:
                return
        score = {"protocol": protocol, "nfe": nfe, "name": metric, "value": value}
        checkpoint.save_weights(self.folder, state, state.sampled_net, KIND, identity(self.run), **{_SCORE: score})

    def remove_older(self, checkpoint_steps: Collection[int]) -> None:
        """Remove weights that no resumed run asks for, once a checkpoint is written.

        A run resumes from one of the checkpoints, of these steps, and asks for the last weights up to that step. Those
        newer than the last checkpoint stay: a resumed run removes them.
        """
        files = manifest.paths_by_step(self.folder, ".safetensors")
        kept_steps = {step for step in files if step > max(checkpoint_steps)}
        for checkpoint_step in checkpoint_steps:
            steps_up_to_checkpoint = [step for step in files if step <= checkpoint_step]
            kept_steps.update(steps_up_to_checkpoint[-1:])
        for step, path in files.items():
            if step not in kept_steps:
                path.unlink()

    def describe(self) -> str | None:
        """Which weights are the best, in a line; None: the run keeps none. Raises UserError as `find_best`."""
        if not self.run.evaluate.best:
            return None
        best = self.find_best()
        if best is None:
            return None
        return f"the best {best.metric} in training, {best.value:.4g}, is of step {best.step:,}: {best.file}"
