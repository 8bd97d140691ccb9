"""Ranks that check a network together: all go on, or all stop with a line.

`on_every_rank` runs a stage of the check, `largest_of_ranks` lets the ranks decide alike by a number.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dumo.runtime import dist
from dumo.types import UserError

Stage = TypeVar("Stage")  # what a stage of the check returns


def on_every_rank(stage: Callable[[], Stage]) -> Stage:
    """Call a stage on this rank, and return what it returns. Every rank must call it.

    Raises UserError on all ranks where the stage raises it on any: there the stage's own.
    """
    try:
        result = stage()
    except UserError:
        largest_of_ranks(1.0)  # tells the others
        raise
    is_refused_anywhere = largest_of_ranks(0.0)
    if is_refused_anywhere:
        raise UserError("another rank's data or network was refused: its line says why")
    return result


def largest_of_ranks(value: float) -> float:
    """The largest `value` of all ranks that train together. Every rank must call it."""
    if dist.world() == 1:
        return value
    values: list[Any] = [None] * dist.world()
    torch.distributed.all_gather_object(values, value)
    return max(values)
