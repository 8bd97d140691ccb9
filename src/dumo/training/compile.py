"""Compile a net's blocks or the whole loss with torch.compile, according to `train.compile`.

The trainer calls `compile_loss` once before its first step unless nothing is compiled; `compile_blocks` compiles only
the blocks of a net. In a guided batch the number of rows that need V(null) varies between steps: blocks are compiled
for the full batch, and at the second size once with dynamic shapes. A compiled loss passes all rows.
"""

from typing import Literal

import torch
from torch import nn

from dumo.flow.module import Loss
from dumo.types import Objective, UserError

# Compiled variants of the code that all blocks share: for each kind of block, with and without gradients, when it is
# recomputed, and for two batch sizes. Torch's limit of 8 fails for an SD3 with checkpointing.
_MAX_COMPILED_VARIANTS = 64


def compile_loss(net: nn.Module, objective: Objective, choice: Literal["blocks", "loss"]) -> Loss:
    """Return the compiled loss, or, if `choice` is `blocks`, compile the blocks in place and return the plain loss.

    Raise UserError if the net has no blocks.
    """
    if choice == "loss":
        return torch.compile(objective.loss, fullgraph=True)
    compile_blocks(net)
    return objective.loss


def compile_blocks(net: nn.Module, *, dynamic: bool | None = None) -> None:
    """Compile a net's `regions`, or else its `blocks`, in place, and the tape of a dual slope.

    Equal blocks share compiled code. `dynamic` is passed to torch.compile. Raise UserError if the net has no blocks.
    """
    blocks = getattr(net, "regions", getattr(net, "blocks", None))
    if not blocks:
        raise UserError("train.compile=blocks needs a network with blocks: set train.compile to loss or none")
    torch.compiler.config.recompile_limit = _MAX_COMPILED_VARIANTS
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic)
    net.compile_tangents = True  # pyright: ignore[reportArgumentType], read by `Dual`
