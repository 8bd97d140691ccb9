"""The best weights of a run in training: best/ in its folder holds the sampled weights with the best validation score.

`Validation` calls `BestFolder.save_if_best` after each score, and the journal calls `remove_older` after each
checkpoint. A file states its score and how it was measured, since only scores measured alike are compared.

On resume, `run.history` drops weights that are newer than the checkpoint. So one older file is kept for each checkpoint
from which the run may resume.
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

# The kind and the name of the score in the metadata of a file of weights.
KIND = "best weights"
_SCORE = "score"


@dataclass(frozen=True)
class BestWeights:
    """A file in best/, and the score of its weights."""

    file: Path
    step: int
    metric: str
    value: float
    # The name of the protocol that measured it, and the NFE of the samples.
    protocol: str
    nfe: int


class BestFolder:
    """The best weights of a run in training."""

    def __init__(self, run: Run, run_folder: Path, identities: Set[str] = frozenset()) -> None:
        """`identities` are those of the run that the folder holds (`RecordedRun.identities`).

        Weights that were written under one of them, or under the identity of `run`, belong to this run.
        """
        self.run = run
        self.folder = run_folder / BEST_FOLDER
        self.identities = {*identities, identity(run)}

    def find_best(self, max_step: int | None = None) -> BestWeights | None:
        """Return the newest weights up to step `max_step`, or None if there are none.

        Raises UserError if the file is not the one that this run wrote.
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

        Every rank must call it with the same score. Raises UserError if the weights in the folder are another run's.
        """
        # Weights of another run are refused whatever the score is, so they are read first.
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
        """Remove weights that no resumed run needs. Called once a checkpoint is written.

        A run that resumes from one of the checkpoints needs the last weights up to its step. Weights newer than the
        last checkpoint are kept; a resumed run removes them.
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
        """Describe the best weights in a line; None if the run keeps none."""
        if not self.run.evaluate.best:
            return None
        best = self.find_best()
        if best is None:
            return None
        return f"the best {best.metric} in training, {best.value:.4g}, is of step {best.step:,}: {best.file}"
