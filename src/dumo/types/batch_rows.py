"""Select rows of a batch by position, and copy indices and tensors to a device without synchronization.

`spread_evenly` and `split_by_moving` use positions only, which are known before any pass, so shapes are static and all
ranks make the same passes. `index`, `to_device` and `pin` copy to a device.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import floor

import torch
from jaxtyping import Int
from torch import Tensor


def split_by_moving(moving: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Return the positions of the rows that move and of the rows that do not, both in order."""
    moving_places = [i for i, is_moving in enumerate(moving) if is_moving]
    resting_places = [i for i, is_moving in enumerate(moving) if not is_moving]
    return moving_places, resting_places


def spread_evenly(n: int, share: float) -> tuple[bool, ...]:
    """Select a fraction `share` in [0, 1] of n rows, evenly spread. Whether a row is selected does not depend on n."""
    # 1e-9 compensates for rounding: 0.29 * 100 is just below 29.
    picked_before = [floor(i * share + 1e-9) for i in range(n + 1)]
    return tuple(before < after for before, after in pairwise(picked_before))


def index(rows: Sequence[int], device: torch.device) -> Int[Tensor, " k"]:
    """Return positions of rows as an index tensor (k,) on a device, cached on GPUs.

    Indexing with a list would copy the list to the GPU, and synchronize, at every operation.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _index(tuple(rows), device)
    return torch.tensor(rows, device=device, dtype=torch.long)


@lru_cache(maxsize=64)
def _index(rows: tuple[int, ...], device: torch.device) -> Int[Tensor, " k"]:
    """Return the cached index on a GPU. It is not an inference tensor, because passes with gradients use it too."""
    with torch.inference_mode(False):
        return to_device(torch.tensor(rows, dtype=torch.long), device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without synchronization, using pinned memory for GPUs."""
    if device.type == "cuda":
        x = pin(x)
    return x.to(device, non_blocking=True)


def pin(x: Tensor) -> Tensor:
    """Return a CPU tensor in pinned memory. Other tensors are returned unchanged."""
    if x.device.type == "cpu" and not x.is_pinned():
        return x.pin_memory()
    return x
