"""The training loop: a batch, a step, the hooks. All that changes is in `State`.

A batch is a function of the step number and every draw is keyed by it, so N steps, a stop, and M more are the same run
as N + M steps, skipped ones included. So both may be made ahead, by whom and when changes nothing in them. Everything
else (log, checkpoints, samples, a progress bar) is a hook.

torch.compile takes a net's blocks, or the whole loss. In a guided batch the number of rows that need V(null) changes
from step to step: blocks are compiled for the batch and, at the second number of rows, once for all numbers. A whole
loss passes all rows.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from dumo.flow.draw import Draws
from dumo.flow.flow import Flow, Loss
from dumo.flow.precision import products
from dumo.runtime import dist
from dumo.runtime.signals import Stopped
from dumo.training.record import Record, Skipped
from dumo.training.spec import Compile, Train
from dumo.training.state import Diverged, State
from dumo.training.step import Batch, train_step
from dumo.types import Objective, UserError

T = TypeVar("T")
COMPILERS = ("g++", "clang++")
BATCHES = 3  # of data, ahead of the step, each made by a thread. One hides a late file, more a slow epoch's start. Ours


@dataclass(frozen=True)
class Every:
    """Call f(state, record) after every n-th step, counted from the start of the run."""

    n: int
    f: Callable[[State, Record], None]


def train(
    state: State,
    flow: Flow,
    batches: Callable[[int], Batch],
    spec: Train,
    hooks: Sequence[Every] = (),
    due: Callable[[], bool] = lambda: False,
    draws: Callable[[int], Draws] | None = None,
) -> None:
    """Train `state` in place until `spec.steps` steps are done, by a flow of its net.

    `batches(step)` is this rank's rows of a batch, on the net's device; `draws(step)` its random numbers, as `draws_of`
    (None: each step draws them); `due()` says whether a checkpoint is due. Raises Diverged after `spec.max_skips`
    skipped steps in a row, and Stopped if a rank got a signal and steps are left, each after the step's hooks; else as
    `train_step`.
    """
    loss = compiled(state.net, flow.objective, spec.compile)
    with products(spec.precision, next(state.net.parameters()).device):
        while state.step < spec.steps:
            now = state.step
            record = train_step(state, flow, batches(now), spec, loss, draws and draws(now), due=due())
            dist.end_start()
            for hook in hooks:
                if state.step % hook.n == 0:
                    hook.f(state, record)
            if record.skipped and state.skips >= spec.max_skips:
                raise Diverged(diverged(record.step, record.skipped, state.skips))
            if record.asked is not None and state.step < spec.steps:
                raise Stopped(record.asked)


def diverged(step: int, skipped: Skipped, count: int) -> str:
    """What happened, and what to try."""
    row = "" if count == 1 else f", as in the {count - 1} before it" if count > 2 else ", as in the one before it"
    return (
        f"step {step} diverged: {skipped}{row}. {'It was not' if count == 1 else 'None of them was'} applied. "
        "Try a lower learning rate, gradient clipping, another slope, or precision fp32."
    )


def compiled(net: nn.Module, objective: Objective, choice: Compile) -> Loss:
    """The loss, after torch.compile of the net's blocks (in place), of the whole loss, or of nothing.

    Raises UserError if the net has no blocks, or the machine no compiler.
    """
    if choice != "none" and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise UserError(
            f"train.compile = {choice} needs a C++ compiler, and there is none: install {' or '.join(COMPILERS)}, or "
            "set train.compile=none"
        )
    if choice == "blocks":
        compile_blocks(net)
    return torch.compile(objective.loss, fullgraph=True) if choice == "loss" else objective.loss


def compile_blocks(net: nn.Module, *, dynamic: bool | None = None) -> None:
    """Compile a net's `regions`, else its blocks, in place, and the tape of a dual slope. UserError if it has none.

    Blocks are alike and share compiled code; `dynamic` as torch.compile's.
    """
    if not (blocks := getattr(net, "regions", getattr(net, "blocks", None))):
        raise UserError("compile 'blocks': this net has none: use loss, or none")
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic)
    net.compile_tangents = True  # pyright: ignore[reportArgumentType], read by `Dual`


class Prefetch(Generic[T]):
    """`make(step)` for steps that are asked for in their order: the next `depth` are begun before, each in a thread.

    Another step than the next may be asked for; then what comes after that is made. What `make` raises for a step is
    raised where that step is asked for. At its end no thread is left.
    """

    def __init__(self, make: Callable[[int], T], *, last: int, depth: int = 1) -> None:
        """Begin nothing yet. Nothing is made ahead for step `last` or later ones."""
        self.make, self.last, self.depth = make, last, depth
        torch.get_num_threads()  # this thread's number is settled first: threads begun later would have 1
        # A thread with a team of OpenMP's would take the cores from the step, 1.4 to 1.7 times as long on two of them.
        self.threads = ThreadPoolExecutor(depth, "ahead", initializer=torch.set_num_threads, initargs=(1,))
        self.coming: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        """The value of a step."""
        now = self.coming.pop(step, None) or self.threads.submit(self.make, step)
        wanted = range(step + 1, min(step + 1 + self.depth, self.last))
        for other in self.coming.keys() - set(wanted):
            self.coming.pop(other).cancel()
        for other in wanted:
            if other not in self.coming:
                self.coming[other] = self.threads.submit(self.make, other)
        return now.result()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.coming.clear()
        self.threads.shutdown(cancel_futures=True)
