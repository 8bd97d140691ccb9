"""torch.compile of a net's blocks, or of the whole loss, as `train.compile` says.

The loop calls `compile_loss` once, before its first step; `compile_blocks` compiles the blocks of a net alone. In a
guided batch the number of rows that need V(null) changes from step to step: blocks are compiled for the batch and, at
the second number of rows, once for all numbers. A whole loss passes all rows.
"""

import os
import shutil

import torch
from torch import nn

from dumo.flow.flow import Loss
from dumo.training.spec import Compile
from dumo.types import Objective, UserError

COMPILERS = ("g++", "clang++")


def compile_loss(net: nn.Module, objective: Objective, choice: Compile) -> Loss:
    """The loss to train by: the objective's own, or compiled where `choice` is `loss`.

    Where it is `blocks`, the net's blocks are compiled in place. Raises UserError if the net has no blocks, or
    the machine no compiler.
    """
    _require_compiler(choice)
    if choice == "loss":
        return torch.compile(objective.loss, fullgraph=True)
    if choice == "blocks":
        compile_blocks(net)
    return objective.loss


def _require_compiler(choice: Compile) -> None:
    """Raise UserError if `choice` needs a C++ compiler (of `CXX`, or one of COMPILERS) and the machine has none."""
    if choice == "none":
        return
    candidates = (os.environ.get("CXX", ""), *COMPILERS)
    if not any(shutil.which(candidate) for candidate in candidates):
        raise UserError(
            f"train.compile = {choice} needs a C++ compiler, and there is none: install {' or '.join(COMPILERS)}, or "
            "set train.compile=none"
        )


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
