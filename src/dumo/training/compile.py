"""torch.compile where training can use it: on a net's blocks, or on the whole loss."""

import torch
from torch import nn

from dumo.training.spec import Compile
from dumo.training.step import Loss
from dumo.types import Objective, UserError


def compiled(net: nn.Module, objective: Objective, choice: Compile) -> Loss:
    """The loss as it is to be run, by torch.compile: its net's blocks (in place), all of it, or none.

    Raises UserError if blocks are to be compiled and there are none.
    """
    if choice == "blocks":
        compile_blocks(net)
    return torch.compile(objective.loss, fullgraph=True) if choice == "loss" else objective.loss


def compile_blocks(net: nn.Module, *, dynamic: bool | None = None) -> None:
    """Compile each block of a net in place, and the tape of a slope that rides on them. Raises UserError without any.

    Blocks are alike and share the code of one; `dynamic` as torch.compile's.
    """
    if not (blocks := getattr(net, "blocks", None)):
        raise UserError("compile 'blocks': this net has none: use loss, or none")
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic)
    net.compile_tangents = True  # pyright: ignore[reportArgumentType], what `Dual` asks of a net
