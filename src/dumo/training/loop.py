"""The training loop: a batch, a step, the hooks; nothing is kept outside `State`.

A batch is a function of the step number and every draw is keyed by it, so N steps, a stop, and M more are the same run
as N + M steps. What else a run does (log, save, sample, draw a bar) hangs on the loop as hooks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dumo.flow.draw import Draws
from dumo.flow.precision import products
from dumo.training.compile import compiled
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.training.step import Batch, Record, Task, train_step


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
    draws: Callable[[int], Draws] | None = None,
) -> None:
    """Train `state` in place until `spec.steps` steps are done, from wherever it stands.

    `batches(step)` is this rank's rows of a step's batch, on the device of the net; `draws(step)` the numbers that it
    draws for them, as `draws_of` gives them; None: each step draws its own. Raises as `train_step` does.
    """
    loss = compiled(state.net, task.objective, spec.compile)
    with products(spec.precision, next(state.net.parameters()).device):
        while state.step < spec.steps:
            record = train_step(state, task, batches(state.step), spec, loss, draws and draws(state.step))
            for hook in hooks:
                if state.step % hook.n == 0:
                    hook.f(state, record)
