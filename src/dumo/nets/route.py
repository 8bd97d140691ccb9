"""Token routing: in training, some tokens skip the middle blocks (TREAD, Krause et al. 2025, arXiv 2501.04765).

All blocks except the `first` and `last` ones of `Route` are routed. They process a random subset of each row's tokens;
the remaining tokens are unchanged and rejoin after these blocks. There are no new weights, and sampling is dense.

The cost of a block is proportional to its tokens. With F a forward pass, a guided exact step of XL/2 costs
4.95 F dense, 2.88 with half of them, 1.87 with a quarter (`dumo show imagenet256-xl2-routed`, and with
`net.route.share=0.75`).

1. `Route.mark_blocks` marks the routed blocks when a network is built.
2. In each training pass, `Route.draw_split` draws the tokens to process, a `TokenSplit`.
3. The network runs its blocks with `TokenSplit.run_blocks`.

Properties:

- The tokens that skip depend only on row and step, through the keys of `dumo.flow.dropout`. All passes of a step
  therefore use the same split, and du/dt is the derivative of the trained function. `dropout.off` does not disable
  routing.
- Selecting tokens is linear, so tangents are selected with their tokens.
- Targets are computed with the routed network. An average as theta^- is in evaluation mode, so it is dense.
- Tokens keep their positions: waves are added before the selection, and rotary tables are selected as well.
- The same number of tokens skips in every row, so shapes are static.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, cat, nn

from dumo.flow.dropout import Keys, current, hashes, layer_keys
from dumo.runtime.limits import BLOCKS
from dumo.types import Array, Spec, UserError

# The layer number of the dropout keys for routing. Layer 0 is word dropout (`dumo.nets.learned`).
_ROUTING_LAYER = 1


class Route(Spec):
    """The routed blocks, and the share of the tokens that skip them. Defaults are TREAD's for B/2 (its code)."""

    kind: Literal["tread"] = "tread"
    # TREAD uses 0.5.
    share: float = Field(ge=0, lt=1)
    # The numbers of dense blocks at the start and at the end.
    first: int = Field(default=2, ge=0, le=BLOCKS)
    last: int = Field(default=3, ge=0, le=BLOCKS)

    def mark_blocks(self, blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
        """Set `is_routed` in each block of a network, which copies of the block keep.

        Raises UserError if no block is routed.
        """
        depth = len(blocks)
        if self.first + self.last >= depth:
            raise UserError(
                f"net.route has no block between the first {self.first} and the last {self.last} of {depth}: decrease "
                "net.route.first or net.route.last, or set net.route=null"
            )
        for i, block in enumerate(blocks):
            block.is_routed = self.first <= i < depth - self.last  # pyright: ignore[reportArgumentType]

    def draw_split(self, b: int, n: int) -> "TokenSplit | None":
        """Draw which of n tokens skip in each of b rows, or return None if none does.

        Raises RuntimeError as `dropout.current`.
        """
        row_keys = current(b, route=True)
        if row_keys is None or not self.share:
            return None
        num_processed = max(1, n - round(self.share * n))
        return TokenSplit(row_keys, n, num_processed)


class TokenSplit:
    """The tokens of a pass that the routed blocks process, and those that skip, as indices (b, tokens).

    inverse: the permutation from (processed, skipped) to the original order.
    """

    def __init__(self, row_keys: Keys, n: int, num_processed: int) -> None:
        """Draw `num_processed` of the n tokens of each row, with the row's key."""
        order = hashes(layer_keys(row_keys, _ROUTING_LAYER), n).argsort(1)
        self.processed = order[:, :num_processed]
        self.skipped = order[:, num_processed:]
        self.inverse = order.argsort(1)

    def select(self, tokens: Array) -> Array:
        """Select the tokens to process, (b, num_processed, width), from all tokens (b, n, width)."""
        return _select_tokens(tokens, self.processed)

    def merge(self, tokens: Array, all_tokens: Array) -> Array:
        """Join processed tokens (b, num_processed, width) with the skipped ones of `all_tokens` (b, n, width)."""
        skipped = _select_tokens(all_tokens, self.skipped)
        return _select_tokens(cat([tokens, skipped], 1), self.inverse)

    def select_rotary(self, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Select the entries of rotary tables (n, size) for the tokens to process: (b, 1, num_processed, size) each."""
        return tuple(table[self.processed].unsqueeze(1) for table in tables)

    def run_blocks(
        self, blocks: nn.ModuleList, tokens: Array, rotary: tuple[Tensor, ...], run_block: Callable[..., Array]
    ) -> Array:
        """Run tokens (b, n, width) through all blocks, of which some tokens skip the routed ones.

        Block i is called as `run_block(i, block, tokens, *tables)`, with the rotary tables of the tokens that it gets.

        rotary: tables for all tokens, (n, size) each.
        """
        # The tokens before the routed blocks.
        all_tokens = tokens
        block_tables = rotary
        is_split = False
        for i, block in enumerate(blocks):
            if block.is_routed and not is_split:
                is_split = True
                all_tokens = tokens
                tokens = self.select(tokens)
                block_tables = self.select_rotary(rotary)
            elif is_split and not block.is_routed:
                is_split = False
                tokens = self.merge(tokens, all_tokens)
                block_tables = rotary
            tokens = run_block(i, block, tokens, *block_tables)
        if is_split:
            tokens = self.merge(tokens, all_tokens)
        return tokens


def _select_tokens(tokens: Array, index: Tensor) -> Array:
    """Select from tokens (b, n, width) those at the positions `index` (b, k) of each row."""
    b, n, width = tokens.shape
    flat = (index + n * torch.arange(b, device=index.device)[:, None]).flatten()
    return tokens.flatten(0, 1).index_select(0, flat).view(b, -1, width)
