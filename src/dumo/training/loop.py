"""The training loop: `train` takes a batch, makes a step, and calls the hooks. All that changes is in `State`.

A batch and its random numbers depend on the step's number alone. So N steps, a stop and M more equal N + M steps
(skipped steps count), and both may be made ahead, by any thread. Everything else (log, checkpoints, samples, a progress
bar) is a hook.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dumo.flow.module import Flow
from dumo.flow.noise import Draws
from dumo.flow.precision import product_precision
from dumo.runtime.signals import Stopped
from dumo.training.compile import compile_loss
from dumo.training.duration import Timing
from dumo.training.record import Record, Skipped
from dumo.training.spec import Train
from dumo.training.state import Diverged, State
from dumo.training.step import Batch, train_step


@dataclass(frozen=True)
class Every:
    """A hook: call f(state, record) after every n-th step, counted from the start of the run."""

    n: int  # steps from one call to the next, at least 1
    f: Callable[[State, Record], None]  # gets the state after the step, and the step's record


def train(
    state: State,
    flow: Flow,
    batch_at: Callable[[int], Batch],
    spec: Train,
    hooks: Sequence[Every] = (),
    checkpoint_due: Callable[[], bool] = lambda: False,
    draws_at: Callable[[int], Draws] | None = None,
    read_clock: Callable[[], Timing] | None = None,
) -> None:
    """Train `state` in place until `spec.steps` steps are done, or its time is over, by a flow of its net.

    - `batch_at(step)`: this rank's rows of a step's batch, on the net's device.
    - `hooks`: called after each step, in their order.
    - `checkpoint_due()`: whether it is time for a checkpoint; the step's record passes it on to the hooks.
    - `draws_at(step)`: a step's random numbers, as `draws_of`; None: each step draws them.
    - `read_clock()`: how far a run by the clock is before the next step; None: it ends by its steps.

    Raises Diverged after `spec.max_skips` skipped steps in a row, and Stopped if a rank got a signal and steps are
    left, each after the step's hooks. Raises what `train_step` raises.
    """
    loss = flow.objective.loss
    if spec.compile != "none":
        loss = compile_loss(state.net, flow.objective, spec.compile)
    device = next(state.net.parameters()).device
    with product_precision(spec.precision, device):
        while not state.is_over:
            step = state.step
            batch = batch_at(step)
            draws = None if draws_at is None else draws_at(step)
            timing = None if read_clock is None else read_clock()
            record = train_step(state, flow, batch, spec, loss, draws, due=checkpoint_due(), timing=timing)
            for hook in hooks:
                if state.step % hook.n == 0:
                    hook.f(state, record)
            if record.skipped and state.skips >= spec.max_skips:
                raise Diverged(_divergence_message(record.step, record.skipped, state.skips))
            if record.received_signal is not None and not state.is_over:
                raise Stopped(record.received_signal)


def _divergence_message(step: int, reason: Skipped, num_skipped: int) -> str:
    """What happened at the last of `num_skipped` skipped steps in a row, and what to try."""
    if num_skipped == 1:
        before = ""
        outcome = "It was not applied."
    elif num_skipped == 2:
        before = ", as in the one before it"
        outcome = "None of them was applied."
    else:
        before = f", as in the {num_skipped - 1} before it"
        outcome = "None of them was applied."
    return (
        f"step {step} diverged: {reason}{before}. {outcome} "
        "Try a lower learning rate, gradient clipping, another slope, or precision fp32."
    )
