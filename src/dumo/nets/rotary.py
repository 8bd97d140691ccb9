"""Rotary positions (Su et al. 2021) on a grid: queries and keys are turned by angles in proportion to their place.

A pair of numbers turned by angle a p at place p, and another turned by a q at place q, have a product that depends on
p - q alone: attention sees how far apart two tokens are, and in which direction, but not where they are. On a grid
half of the pairs turn by the column and half by the row ("axial", Heo et al. 2024).
"""

from math import log

import torch
from torch import Tensor

from dumo.types import Array

PERIOD = 100.0  # Heo et al. 2024: angles per place run from 1 down to nearly 1 / PERIOD


def turns(side: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle, each (side^2, size / 2), for heads of `size` numbers, a multiple of 4."""
    falling = torch.exp(-log(PERIOD) * torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * falling
    grid = torch.cat([angles.repeat(side, 1), angles.repeat_interleave(side, 0)], -1)  # column, then row
    return grid.cos().float(), grid.sin().float()


def turn(a: Array, cos: Array, sin: Array) -> Array:
    """Turn a (b, heads, tokens, size): number i and number i + size / 2 are a pair."""
    one, other = a.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1).to(a.dtype)
