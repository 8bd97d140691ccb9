"""Rows by their place in a batch, and how what the CPU knows of them gets to a device without waiting.

`spread_evenly` picks rows and `split_by_moving` splits them, by their place alone, which is known before any pass. So
shapes are static, and every rank makes the same passes. `index`, `to_device` and `pin` send the places to a device.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import floor

import torch
from jaxtyping import Int
from torch import Tensor


def split_by_moving(moving: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Return the places of the rows that move, and of those that do not, each in order."""
    moving_places = [i for i, is_moving in enumerate(moving) if is_moving]
    resting_places = [i for i, is_moving in enumerate(moving) if not is_moving]
    return moving_places, resting_places


def spread_evenly(n: int, share: float) -> tuple[bool, ...]:
    """Whether each of the first n rows is picked: a share of them, in [0, 1], evenly spread, whatever n is."""
    picked_before = [floor(i * share + 1e-9) for i in range(n + 1)]  # 0.29 * 100 is just below 29
    return tuple(before < after for before, after in pairwise(picked_before))


def index(rows: Sequence[int], device: torch.device) -> Int[Tensor, " k"]:
    """Places of rows as an index (k,) on a device. A GPU keeps it, because most steps ask for the same places.

    Without it every operation that is indexed by a list would send the list anew, and wait for it.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _index(tuple(rows), device)
    return torch.tensor(rows, device=device, dtype=torch.long)


@lru_cache(maxsize=64)
def _index(rows: tuple[int, ...], device: torch.device) -> Int[Tensor, " k"]:
    """Return the index on a GPU; no inference tensor, since passes with gradients use it, too."""
    with torch.inference_mode(False):
        return to_device(torch.tensor(rows, dtype=torch.long), device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the CPU to a device without waiting; to a GPU through pinned memory."""
    if device.type == "cuda":
        x = pin(x)
    return x.to(device, non_blocking=True)


def pin(x: Tensor) -> Tensor:
    """A tensor of the CPU in pinned memory, which a GPU reads by itself; one that is pinned or elsewhere as it is."""
    if x.device.type == "cpu" and not x.is_pinned():
        return x.pin_memory()
    return x
