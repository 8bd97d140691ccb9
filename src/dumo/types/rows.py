"""Rows by their place in a batch, and how what the CPU knows of them gets to a device: nobody waits for it.

What is chosen by place is known before any pass: so shapes are static, and every rank makes the same passes.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import floor

import torch
from jaxtyping import Int
from torch import Tensor


def split_by_step(moving: Sequence[bool]) -> tuple[list[int], list[int]]:
    """The places of the rows that move, and of those that do not."""
    return [i for i, m in enumerate(moving) if m], [i for i, m in enumerate(moving) if not m]


def spread_evenly(n: int, share: float) -> tuple[bool, ...]:
    """Which of the first n rows are picked, by place alone: a share of them, evenly spread, whatever n is."""
    so_far = [floor(i * share + 1e-9) for i in range(n + 1)]
    return tuple(before < after for before, after in pairwise(so_far))


def index(rows: Sequence[int], device: torch.device) -> Int[Tensor, " k"]:
    """Places as an index on a device. To a GPU it is sent once, for most places are the same at every step.

    A list as an index would be sent anew, and waited for, by every operation.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _index(tuple(rows), device)
    return torch.tensor(rows, device=device, dtype=torch.long)


@lru_cache(maxsize=64)
def _index(rows: tuple[int, ...], device: torch.device) -> Int[Tensor, " k"]:
    with torch.inference_mode(False):
        return to_device(torch.tensor(rows, dtype=torch.long), device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting: on its way to a GPU it lies in pinned memory."""
    return (pin(x) if device.type == "cuda" else x).to(device, non_blocking=True)


def pin(x: Tensor) -> Tensor:
    """A tensor of the CPU in pinned memory, from which a GPU reads by itself; others as they are."""
    return x.pin_memory() if x.device.type == "cpu" and not x.is_pinned() else x
