"""Activation checkpointing of blocks (Chen et al. 2016), in a DiT and in models of diffusers.

A checkpointed block keeps its inputs alone, and computes the rest again in the backward pass. `mark_recomputed` marks
the blocks of a net once; in each pass `run_as_marked` calls one.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from dumo.autodiff.dual import Dual, primal_only
from dumo.types import Array

# Which blocks are checkpointed. True: all of them; False: none; n: every n-th, from the first on.
Checkpointing = bool | Annotated[int, Field(ge=2)]


def mark_recomputed(blocks: Iterable[nn.Module], every: Checkpointing) -> None:
    """Set `is_recomputed` in each block: whether it is checkpointed. Copies and parts of a net keep the mark."""
    for i, block in enumerate(blocks):
        block.is_recomputed = bool(every) and i % int(every) == 0  # pyright: ignore[reportArgumentType]


def run_as_marked(block: nn.Module, *inputs: Array | None) -> Array:
    """Return the block's output, with checkpointing if gradients are on and the block is marked, or has no mark.

    diffusers' `enable_gradient_checkpointing` takes this function.
    """
    module = getattr(block, "__self__", block)  # PRX gives the method __call__ of a block
    is_recomputed = bool(getattr(module, "is_recomputed", True))
    if not is_recomputed or not torch.is_grad_enabled():
        return block(*inputs)
    is_recorded = any(isinstance(x, Dual) and x.recorded for x in inputs)
    contexts = noop_context_fn if is_recorded else _without_tangents
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _without_tangents() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's first pass and of its second, which computes no tangents.

    They are needed a second time only if they were recorded for gradients.
    """
    return nullcontext(), primal_only()
