"""Ranks that check a network together: all go on, or all stop with a line."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dumo.runtime import dist
from dumo.types import UserError

Stage = TypeVar("Stage")


def largest_of_ranks(value: float) -> float:
    """The largest of a number over the ranks that train together. Every rank must call it."""
    if dist.world() == 1:
        return value
    values: list[Any] = [None] * dist.world()
    torch.distributed.all_gather_object(values, value)
    return max(values)


def on_every_rank(stage: Callable[[], Stage]) -> Stage:
    """What this stage gives here. Raises UserError on all ranks where it does on any. Every rank must call it."""
    result: list[Stage] = []
    refusal: UserError | None = None
    try:
        result.append(stage())
    except UserError as error:
        refusal = error
    refused = largest_of_ranks(float(refusal is not None))
    if refusal is not None:
        raise refusal
    if refused:
        raise UserError("another rank's data or network was refused: its line says why")
    return result[0]
