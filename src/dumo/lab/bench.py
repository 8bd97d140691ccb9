"""Times of several pieces of work on one machine, which other programs may use too; and the net that they run.

All pieces are run in turn, round by round, so that a slow minute slows them alike, and a ratio is taken within a round.
With one thread on a CPU, CPU time is taken, which leaves out what other programs take.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dumo.flow.precision import Precision
from dumo.run.config.error import nearest
from dumo.run.config.spec import Run
from dumo.run.plan import machine
from dumo.runtime import memory
from dumo.runtime.progress import Bar
from dumo.runtime.random import stream
from dumo.types import UserError

Times = Float[Tensor, "works rounds"]  # seconds

WARM = 2  # rounds before the first that counts: ours; they compile, choose kernels and fill caches


def interleave(title: str, works: Sequence[Callable[[], object]], rounds: int, device: torch.device, bar: Bar) -> Times:
    """Seconds of each piece of work in each round."""
    now, taken = clock(device), torch.zeros(len(works), rounds, dtype=torch.float64)
    with bar(title, WARM + rounds) as tick:
        for i in range(-WARM, rounds):
            for j, work in enumerate(works):
                start = now()
                work()
                if i >= 0:
                    taken[j, i] = now() - start
            tick(WARM + i + 1, "")
    return taken


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, when all work so far is done."""
    alone = device.type != "cuda" and torch.get_num_threads() == 1
    return time.process_time if alone else partial(machine.now, device)


def quartiles(ratios: Float[Tensor, " rounds"]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ratios.dtype)).tolist()
    return low, middle, high


def precisions_of(names: Sequence[str], device: torch.device) -> tuple[Precision, ...]:
    """The precisions by name. Raises UserError for an unknown one, or one that this device does not have."""
    for name in names:
        if name not in get_args(Precision):
            raise UserError(f"there is no precision '{name}'; {nearest(name, list(get_args(Precision)))}")
        if name == "tf32" and device.type != "cuda":
            raise UserError("precision 'tf32' needs a GPU: use fp32 or bf16")
    return cast(tuple[Precision, ...], tuple(names))


def outline(run: Run, shape: tuple[int, ...]) -> nn.Module:
    """The run's net for samples of any shape, without numbers. Raises UserError where it does not fit the shape."""
    if min(shape) < 1:
        raise UserError(f"a sample of shape {shape} has nothing in it: every side is at least 1")
    with torch.device("meta"):
        return run.net.build(run.objective.needs, shape, run.data.classes)


def build(run: Run, shape: tuple[int, ...], device: torch.device, rows: int = 1) -> nn.Module:
    """The net as it starts, its zeros filled; always the same.

    Raises UserError where it does not fit the shape, or the device lacks the memory for it and this number of rows.
    """
    size = sum(value.nbytes for value in outline(run, shape).state_dict().values())
    size += rows * prod(shape) * torch.float32.itemsize
    memory.require(size, "the net and its input take", "take a smaller one, fewer rows or a smaller shape", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("bench", "weights").initial_seed())
        return fill(run.net.build(run.objective.needs, shape, run.data.classes)).to(device)


def fill(net: nn.Module) -> nn.Module:
    """Draw the parameters that are all zero: a net that starts at zero has no derivative to be wrong about."""
    g = stream("bench", "fill")
    for p in net.parameters():
        if not p.any():
            size = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1  # a layer's weights keep the size of its input
            p.data = torch.randn(p.shape, generator=g).to(p) * size
    return net
