"""Train runs in folders, and toys without one."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dumo.config.spec import Run
from dumo.flow.module import Flow
from dumo.flow.noisy_batch import Draws
from dumo.run.hooks import Hook
from dumo.run.trainer import Batch, Trainer, open_trainer
from dumo.runtime.progress import Bar, ignore_line, no_bar
from dumo.training.duration import Timing
from dumo.training.metrics import StepMetrics
from dumo.training.micro_batch import rows_of_rank
from dumo.training.settings import Train
from dumo.training.state import State


class After(Hook):
    """Calls a function after each step, or after each n-th one."""

    def __init__(self, call: Callable[[State, StepMetrics], object], every: int = 1) -> None:
        self.call = call
        self.every = every

    def after_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.step % self.every == 0:
            self.call(trainer.state, metrics)


def train(
    run: Run,
    folder: Path,
    *,
    device: str = "auto",
    bar: Bar = no_bar,
    print_line: Callable[[str], None] = ignore_line,
    hooks: Sequence[Hook] = (),
) -> State:
    """Train a run in a folder, or resume it; return the state at the end. `hooks` come after those of the run."""
    with open_trainer(folder, run, device=device, bar=bar, print_line=print_line) as trainer:
        trainer.hooks += hooks
        return trainer.train()


class ToyTrainer(Trainer):
    """Takes steps on a state by a flow of its network, without a run, data and a folder."""

    def __init__(self, state: State, flow: Flow, config: Train) -> None:
        self.state = state
        self.flow = flow
        self.config = config
        self.rows, self.micro_batches = rows_of_rank(config, flow.objective)
        self.loss = flow.objective.loss

    def draws(self, step: int, shape: Sequence[int], *, z: bool = True) -> Draws:
        """The random numbers of a step for samples of this shape."""
        return self.flow.make_draws(step, shape, batch=self.config.batch, rows=self.rows, z=z)

    def step(self, batch: Batch, *, timing: Timing | None = None, checkpoint_due: bool = False) -> StepMetrics:
        """Take a step on this rank's rows of a batch."""
        draws = self.draws(self.state.step, batch[0].shape[1:], z=len(batch) == 2)
        return self.train_step(batch, draws, timing=timing, checkpoint_due=checkpoint_due)
