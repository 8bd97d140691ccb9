"""torch.compile of a net's blocks, or of the whole loss, as `train.compile` says.

The loop calls `compile_loss` once, before its first step, unless nothing is compiled; `compile_blocks` compiles the
blocks of a net alone. In a guided batch the number of rows that need V(null) changes from step to step: blocks are
compiled for the batch and, at the second number of rows, once for all numbers. A whole loss passes all rows.
"""

from typing import Literal

import torch
from torch import nn

from dumo.flow.module import Loss
from dumo.types import Objective, UserError


def compile_loss(net: nn.Module, objective: Objective, choice: Literal["blocks", "loss"]) -> Loss:
    """The loss to train by: compiled, or the objective's own where `choice` is `blocks`, which compiles those in place.

    Raises UserError if the net has no blocks.
    """
    if choice == "loss":
        return torch.compile(objective.loss, fullgraph=True)
    compile_blocks(net)
    return objective.loss


def compile_blocks(net: nn.Module, *, dynamic: bool | None = None) -> None:
    """Compile a net's `regions`, or else its `blocks`, in place, and the tape of a dual slope.

    Blocks are alike and share compiled code; `dynamic` is that of torch.compile. Raises UserError if the net has none.
    """
    blocks = getattr(net, "regions", getattr(net, "blocks", None))
    if not blocks:
        raise UserError("compile 'blocks': this net has none: use loss, or none")
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic)
    net.compile_tangents = True  # pyright: ignore[reportArgumentType], read by `Dual`
