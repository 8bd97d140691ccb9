"""Blocks that keep their inputs alone, and compute the rest again in the backward pass (Chen et al. 2016)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dumo.autodiff.dual import primal_only, recorded, recording
from dumo.types import Array


def run(block: nn.Module, *inputs: Array | None, lean: bool) -> Array:
    """The block's output; `lean`: what the backward pass needs is computed again there, where there is one."""
    if lean and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=_again)
    return block(*inputs)


def leanly(block: nn.Module, *inputs: Array | None) -> Array:
    """`run`, lean: as diffusers wants it to be told how."""
    return run(block, *inputs, lean=True)


def _again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The tangents that ride on a block are known by the time it is computed again, unless they were recorded."""
    return nullcontext(), recorded() if recording() else primal_only()
