"""The training loop: a batch, a step, the hooks; nothing is kept outside `State`.

A batch is a function of the step number and every draw is keyed by it, so N steps, a stop, and M more are the same run
as N + M steps. What else a run does (log, save, sample, draw a bar) hangs on the loop as hooks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from dumo.training.ema import Ema, MovingAverage
from dumo.training.optim import AdamW, Constant, Optimizer, Schedule
from dumo.training.state import State
from dumo.training.step import Loss, Precision, Record, train_step
from dumo.types import FREE, Frozen, Objective, Path, Spec, Taught, UserError, frozen


class Train(Spec):
    """How to train. Fields marked free may change when a run is resumed."""

    steps: int = Field(ge=1, json_schema_extra=FREE)  # in all, resumed ones included; schedules stretch with it
    batch: int = Field(ge=1)  # rows per step, over all ranks
    accumulate: int = Field(default=1, ge=1)  # pieces a batch is taken in, to save memory; changes rounding
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Constant()
    ema: tuple[Ema, ...] = (Ema(decay=0.9999),)  # App. C.1; the first is sampled and evaluated, the weights if none
    ref: Literal["self"] | float = "self"  # theta^- (Alg. 1): the weights in training, or the average of this decay
    clip: float | None = Field(default=None, gt=0)  # largest norm of the gradient; None: no clipping, as the paper
    compile: Literal["none", "blocks", "loss"] = Field(default="none", json_schema_extra=FREE)  # changes rounding
    precision: Precision = "fp32"  # bf16: autocast of the loss; weights, optimizer and averages stay as they are
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=50, ge=1, json_schema_extra=FREE)  # steps
    probe_every: int = Field(default=250, ge=0, json_schema_extra=FREE)  # steps; 0: never
    save_every: int = Field(default=500, ge=1, json_schema_extra=FREE)  # steps
    keep: int = Field(default=2, ge=1, json_schema_extra=FREE)  # checkpoints
    milestones: tuple[NonNegativeInt, ...] = Field(default=(), json_schema_extra=FREE)  # steps whose weights stay

    @model_validator(mode="after")
    def _possible(self) -> "Train":
        decays = [ema.decay for ema in self.ema]
        if len(set(decays)) < len(decays):
            raise ValueError(f"ema has a decay twice: {decays}")
        if self.ref != "self" and self.ref not in decays:
            raise ValueError(f"ref is the average of decay {self.ref}, but ema has {decays or 'none'}")
        if self.accumulate > self.batch:
            raise ValueError(f"a batch of {self.batch} cannot be taken in {self.accumulate} pieces (accumulate)")
        return self


@dataclass(frozen=True)
class Every:
    """Call f(state, record) after each n-th step, counted from the start of the run."""

    n: int
    f: Callable[[State, Record], None]


def begin(net: nn.Module, spec: Train) -> State:
    """The state before the first step."""
    averages = {ema.decay: MovingAverage(ema, net) for ema in spec.ema}
    return State(net, spec.optimizer(net.parameters()), averages)


def train(
    state: State,
    batches: Callable[[int], tuple[Tensor, ...]],
    objective: Objective,
    path: Path,
    classes: int,
    spec: Train,
    hooks: Sequence[Every] = (),
    teacher: Taught | None = None,
) -> None:
    """Train `state` in place until `spec.steps` steps are done, from wherever it stands.

    `batches(step)` is the global batch of a step, on the device of the net, (x, c) or with their noise (x, c, z);
    `classes` is the label that means none.
    Raises UserError if `spec.ref` is no average of `state`, Diverged as `train_step` does.
    """
    ref, loss = reference(state, spec.ref), compiled(state.net, objective, spec.compile)
    while state.step < spec.steps:
        x, c, *paired = batches(state.step)
        record = train_step(
            state,
            objective,
            path,
            x,
            c,
            torch.full_like(c, classes),
            ref=ref,
            lr=spec.optimizer.lr * spec.schedule(state.step, spec.steps),
            seed=spec.seed,
            progress=state.step / spec.steps,
            accumulate=spec.accumulate,
            clip=spec.clip,
            precision=spec.precision,
            loss=loss,
            z=paired[0] if paired else None,
            teacher=teacher,
            probe=spec.probe_every > 0 and (state.step + 1) % spec.probe_every == 0,
        )
        for hook in hooks:
            if state.step % hook.n == 0:
                hook.f(state, record)


def compiled(net: nn.Module, objective: Objective, choice: Literal["none", "blocks", "loss"]) -> Loss:
    """The loss as it is to be run, by torch.compile: its net's blocks (in place), all of it, or none.

    Raises UserError if blocks are to be compiled and there are none.
    """
    if choice == "blocks":
        compile_blocks(net)
    return torch.compile(objective.loss, fullgraph=True) if choice == "loss" else objective.loss


def compile_blocks(net: nn.Module, *, dynamic: bool | None = None) -> None:
    """Compile each block of a net in place, and the tape of a slope that rides on them. Raises UserError without any.

    Blocks are alike and share the code of one; `dynamic` as torch.compile's.
    """
    if not (blocks := getattr(net, "blocks", None)):
        raise UserError("compile 'blocks': this net has none: use loss, or none")
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic)
    net.compile_tangents = True  # pyright: ignore[reportArgumentType], what `Dual` asks of a net


def reference(state: State, choice: Literal["self"] | float) -> Frozen:
    """theta^-: the weights in training, or the average of a decay. Raises UserError if there is none of that decay."""
    if choice == "self":
        return frozen(state.net)
    if choice not in state.averages:
        raise UserError(f"ref: there is no average of decay {choice}; train has {list(state.averages) or 'none'}")
    return Frozen(state.averages[choice].module)
