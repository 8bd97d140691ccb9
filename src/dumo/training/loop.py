"""The training loop: a batch, a step, the hooks; nothing is kept outside `State`.

A batch is a function of the step number and every draw is keyed by it, so N steps, a stop, and M more are the same run
as N + M steps, skipped ones included. What else a run does (log, save, sample, draw a bar) hangs on the loop as hooks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dumo import dist
from dumo.flow.draw import Draws
from dumo.flow.precision import products
from dumo.stop import Stopped
from dumo.training.compile import compiled
from dumo.training.record import Record, Skipped
from dumo.training.spec import Train
from dumo.training.state import Diverged, State
from dumo.training.step import Batch, Task, train_step


@dataclass(frozen=True)
class Every:
    """Call f(state, record) after each n-th step, counted from the start of the run."""

    n: int
    f: Callable[[State, Record], None]


def train(
    state: State,
    task: Task,
    batches: Callable[[int], Batch],
    spec: Train,
    hooks: Sequence[Every] = (),
    due: Callable[[], bool] = lambda: False,
    draws: Callable[[int], Draws] | None = None,
) -> None:
    """Train `state` in place until `spec.steps` steps are done, from wherever it stands.

    `batches(step)` is this rank's rows of a step's batch, on the device of the net; `draws(step)` the numbers that it
    draws for them, as `draws_of` gives them (None: each step draws its own); `due` what `train_step` is told. Raises
    Diverged after the hooks of the last of `spec.max_skips` steps in a row that were skipped, Stopped after those of a
    step by which a rank was asked to stop, if there are more to do, and else as `train_step` does.
    """
    loss = compiled(state.net, task.objective, spec.compile)
    with products(spec.precision, next(state.net.parameters()).device):
        while state.step < spec.steps:
            now = state.step
            record = train_step(state, task, batches(now), spec, loss, draws and draws(now), due=due())
            dist.settled()
            for hook in hooks:
                if state.step % hook.n == 0:
                    hook.f(state, record)
            if record.skipped and state.skips >= spec.max_skips:
                raise Diverged(told(record.step, record.skipped, state.skips))
            if record.asked is not None and state.step < spec.steps:
                raise Stopped(record.asked)


def told(step: int, skipped: Skipped, count: int) -> str:
    """What happened, and what to try."""
    row = "" if count == 1 else f", as in the {count - 1} before it" if count > 2 else ", as in the one before it"
    return (
        f"step {step} diverged: {skipped}{row}. {'It was not' if count == 1 else 'None of them was'} applied. "
        "Try a lower learning rate, gradient clipping, another slope, or precision fp32."
    )
