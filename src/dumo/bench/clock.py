"""Times of several pieces of work on one machine, which other programs may use too; and how they compute.

All pieces are run in turn, round by round, so that a slow minute slows them alike. What is told is the median over the
rounds of a ratio within each, and the quartiles beside it. With one thread on a CPU, CPU time is taken: what other
programs take is not counted.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dumo.config.error import nearest
from dumo.flow.precision import Precision
from dumo.preflight import machine
from dumo.progress import Bar
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
    own = device.type != "cuda" and torch.get_num_threads() == 1
    return time.process_time if own else partial(machine.now, device)


def spread(ratios: Float[Tensor, " rounds"]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, mid, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ratios.dtype)).tolist()
    return low, mid, high


def known(precisions: Sequence[str], device: torch.device) -> tuple[Precision, ...]:
    """The precisions by name. Raises UserError for one that is none, or none of this device."""
    for name in precisions:
        if name not in get_args(Precision):
            raise UserError(f"there is no precision '{name}'; {nearest(name, list(get_args(Precision)))}")
        if name == "tf32" and device.type != "cuda":
            raise UserError("precision 'tf32' is a GPU's: use fp32 or bf16")
    return cast(tuple[Precision, ...], tuple(precisions))
