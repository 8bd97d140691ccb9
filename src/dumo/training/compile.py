"""torch.compile where training can use it: on a net's blocks, or on the whole loss.

Of a guided batch the rows that need V(null) differ in number from step to step. Blocks are compiled for the batch and,
at the second number of rows that they meet, once for all numbers. A whole loss makes the pass of all rows.
"""

import os
import shutil

import torch
from torch import nn

from dumo.training.spec import Compile
from dumo.training.step import Loss
from dumo.types import Objective, UserError

COMPILERS = ("g++", "clang++")


def compiled(net: nn.Module, objective: Objective, choice: Compile) -> Loss:
    """The loss as it is to be run, by torch.compile: its net's blocks (in place), all of it, or none.

    Raises UserError if blocks are to be compiled and there are none, or if there is no compiler.
    """
    if choice != "none" and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise UserError(
            f"train.compile = {choice} needs a C++ compiler, and there is none: install {' or '.join(COMPILERS)}, or "
            "set train.compile=none"
        )
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
