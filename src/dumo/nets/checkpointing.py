"""Activation checkpointing of blocks (Chen et al. 2016), for DiT and diffusers models.

A checkpointed block stores only its inputs, and recomputes its activations in the backward pass. `mark_recomputed`
marks the blocks of a network, and `run_as_marked` runs a block accordingly.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from dumo.autodiff.dual import Dual, primal_only
from dumo.nets.lora import active_adapters, with_adapters
from dumo.types import Array

# Which blocks are checkpointed: all (True), none (False), or every n-th from the first (n).
Checkpointing = bool | Annotated[int, Field(ge=2)]


def mark_recomputed(blocks: Iterable[nn.Module], every: Checkpointing) -> None:
    """Set `is_recomputed` in each block, which copies of the block keep."""
    for i, block in enumerate(blocks):
        block.is_recomputed = bool(every) and i % int(every) == 0  # pyright: ignore[reportArgumentType]


def run_as_marked(block: nn.Module, *inputs: Array | None) -> Array:
    """Return the block's output, with checkpointing if gradients are enabled and the block is marked or has no mark.

    It has the signature that diffusers' `enable_gradient_checkpointing` expects.
    """
    # PRX passes the bound method __call__ of a block.
    module = getattr(block, "__self__", block)
    is_recomputed = bool(getattr(module, "is_recomputed", True))
    if not is_recomputed or not torch.is_grad_enabled():
        return block(*inputs)
    is_recorded = any(isinstance(x, Dual) and x.recorded for x in inputs)
    contexts = noop_context_fn
    if not is_recorded:
        names = active_adapters(module)
        contexts = _without_tangents
        if names is not None:
            contexts = partial(_as_in_first_pass, module, names, training=module.training)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _without_tangents() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's first pass, and of the recomputation, which needs no tangents."""
    return nullcontext(), primal_only()


def _as_in_first_pass(
    block: nn.Module, names: Sequence[str], *, training: bool
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the same contexts for a block with adapters, of which these were active, in this mode.

    In the backward pass other adapters may be active, and the mode may differ if the first pass was a teacher's. The
    recomputation with those would give wrong gradients.
    """
    return nullcontext(), _recompute_with(block, names, training=training)


@contextmanager
def _recompute_with(block: nn.Module, names: Sequence[str], *, training: bool) -> Generator[None, None, None]:
    modes: list[tuple[nn.Module, bool]] = []
    if block.training != training:
        modes += [(part, part.training) for part in block.modules()]
        block.train(training)
    try:
        with primal_only(), with_adapters(block, *names):
            yield
    finally:
        for part, was_training in modes:
            part.training = was_training
