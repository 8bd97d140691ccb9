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
    """What this stage returns here. Raises UserError on all ranks where it does on any. Every rank must call it."""
    refusal: UserError | None = None
    result: list[Stage] = []
    try:
        result.append(stage())
    except UserError as error:
        refusal = error
    is_refused_anywhere = largest_of_ranks(float(refusal is not None))
    if refusal is not None:
        raise refusal
    if is_refused_anywhere:
        raise UserError("another rank's data or network was refused: its line says why")
    return result[0]


def largest_of_ranks(value: float) -> float:
    """The largest of a number over the ranks that train together. Every rank must call it."""
    if dist.world() == 1:
        return value
    values: list[Any] = [None] * dist.world()
    torch.distributed.all_gather_object(values, value)
    return max(values)
