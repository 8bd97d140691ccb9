"""Long skips (U-ViT, Bao et al. 2023): what a block of the first half puts out reaches the one opposite it.

Of `depth` blocks, counted from 0, block depth - 1 - i takes in what block i puts out: beside its own input, through one
linear layer, which the paper found better than sums. No skip leads to the very next block, which has it anyway.

The layer starts as [1 0], and takes the input as it is. So a net with skips starts as the net without, whose blocks are
the identity at the start (ours: the paper draws it). It costs 2 width^2 multiply-adds a token; a block without
attention costs 12 width^2.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dumo.nets.block import Stream
from dumo.nets.checkpointing import run
from dumo.types import Array


class Joined(nn.Module):
    """A block that takes in a skip."""

    def __init__(self, block: Stream, join: nn.Linear) -> None:
        """`join` is from twice the block's width to its width, and made to start as [1 0]."""
        super().__init__()
        self.join, self.block = join, block

    def start(self) -> None:
        """With the input as it is, and nothing of the skip. A bias is left alone."""
        nn.init.eye_(self.join.weight)

    def forward(self, h: Array, skip: Array, *told: Array | None) -> Array:
        """h and skip (b, tokens, width), and what the block is told beside h."""
        return self.block(self.join(torch.cat([h, skip], -1)), *told)


def joined(blocks: Sequence[Stream], linear: type[nn.Linear], width: int) -> list[nn.Module]:
    """The blocks, of which the last ones take in skips: fewer than half, for the middle has none."""
    plain = len(blocks) - skips(len(blocks))
    return [*blocks[:plain], *(Joined(block, linear(2 * width, width)) for block in blocks[plain:])]


def through(
    blocks: Sequence[nn.Module],
    h: Array,
    *told: Array | None,
    lean: bool,
    shown: int | None = None,
    then: tuple[int | None, Array] | None = None,
) -> tuple[Array, list[Array]]:
    """h after all blocks, which are told the same, and h after the block `shown`, if any; `lean` as `run` has it.

    With `then` the blocks after so many are told something else, in the place of the first that is told. Blocks are
    counted from 1. The last is shown of a net with fewer, by which a deep one is counted; and pairs are found by
    counting, so that they are right of it.
    """
    joins = sum(isinstance(block, Joined) for block in blocks)
    kept: list[Array] = []  # a compiler cannot make list[Array]()
    inside: list[Array] = []
    shown = shown and min(shown, len(blocks))
    for i, block in enumerate(blocks):
        told = (then[1], *told[1:]) if then and i == then[0] else told
        skip = [kept.pop()] if isinstance(block, Joined) else []
        h = run(block, h, *skip, *told, lean=lean)
        kept += [h] if i < joins else []
        inside += [h] if i + 1 == shown else []
        if i < joins or i + 1 == shown:
            h = h.view_as(h)  # so that ranks, which have such a node before every block, add gradients in this order
    return h, inside


def skips(depth: int) -> int:
    """How many skips so many blocks have."""
    return (depth - 1) // 2
