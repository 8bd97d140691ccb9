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
        contexts = partial(_with_adapters_of_first_pass, module, names) if names else _without_tangents
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _without_tangents() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's first pass, and of the recomputation, which needs no tangents."""
    return nullcontext(), primal_only()


def _with_adapters_of_first_pass(
    block: nn.Module, names: Sequence[str]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the same contexts for a block with adapters.

    Other adapters may be active in the backward pass, and the recomputation with those would give wrong gradients.
    """
    return nullcontext(), _recompute_with(block, names)


@contextmanager
def _recompute_with(block: nn.Module, names: Sequence[str]) -> Generator[None, None, None]:
    with primal_only(), with_adapters(block, *names):
        yield
