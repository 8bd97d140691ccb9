"""Token routing: in training some tokens skip the middle blocks (TREAD, Krause et al. 2025, arXiv 2501.04765).

The routed blocks are all but the `first` and the `last` ones of `Route`, the spec. They process a random part of each
row's tokens. The other tokens come back unchanged behind them. There are no new weights, and sampling is dense.

A block costs as much as the tokens that it processes. In forward passes F, a guided exact step of XL/2 counts
4.95 F dense, 2.88 with half of them, 1.87 with a quarter (`dumo show imagenet256-xl2-routed`, and with
`net.route.share=0.75`).

The order of events:

1. `Route.mark_blocks` marks the routed blocks of a net, once, when the net is built.
2. In each training pass `Route.draw_split` draws which tokens are processed, as a `TokenSplit`.
3. The net runs its blocks by `TokenSplit.run_blocks`.

What this assumes:

- Which tokens skip depends on row and step alone, by the keys of `dumo.flow.dropout`. So all passes of a step split
  alike, guided or not, and du/dt is the derivative of the function that is trained. `dropout.off` leaves routing on.
- A tangent moves with its token, because selecting tokens is linear.
- Targets are made by passes of the routed net. An average such as theta^- is in the mode of sampling, so it is dense.
- A token knows its place before it is selected: waves are in it, and rotary tables are selected alike.
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

_ROUTING_LAYER = 1  # a layer of `dumo.flow.dropout` has keys of its own; layer 0 drops words (`dumo.nets.text_spec`)


class Route(Spec):
    """Which blocks are routed, and the share of the tokens that skip them. Defaults are TREAD's, for B/2 (its code)."""

    kind: Literal["tread"] = "tread"
    share: float = Field(ge=0, lt=1)  # TREAD: 0.5; 0: none skip
    first: int = Field(default=2, ge=0, le=BLOCKS)  # blocks at the start that see all tokens
    last: int = Field(default=3, ge=0, le=BLOCKS)  # blocks at the end that do

    def mark_blocks(self, blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
        """Set `is_routed` in each of the blocks of a net, in their order.

        All that runs or counts blocks reads it. Copies and parts of the net keep the mark. Raises UserError where no
        block is left between the first and the last.
        """
        depth = len(blocks)
        if self.first + self.last >= depth:
            raise UserError(
                f"net.route leaves no block between the first {self.first} and the last {self.last} of {depth}: lower "
                "net.route.first or net.route.last, or set net.route=null"
            )
        for i, block in enumerate(blocks):
            block.is_routed = self.first <= i < depth - self.last  # pyright: ignore[reportArgumentType]

    def draw_split(self, b: int, n: int) -> "TokenSplit | None":
        """Draw which of n tokens skip in each of b rows; None: none does, as in sampling.

        Raises RuntimeError as `dropout.current`.
        """
        row_keys = current(b, route=True)
        if row_keys is None or not self.share:
            return None
        num_processed = max(1, n - round(self.share * n))
        return TokenSplit(row_keys, n, num_processed)


class TokenSplit:
    """Which tokens of a pass the routed blocks process, and which skip. It holds places in a row, (b, tokens) each."""

    def __init__(self, row_keys: Keys, n: int, num_processed: int) -> None:
        """Draw, by the key of each row, the `num_processed` of its n tokens that are processed."""
        order = hashes(layer_keys(row_keys, _ROUTING_LAYER), n).argsort(1)
        self.processed = order[:, :num_processed]
        self.skipped = order[:, num_processed:]
        self.inverse = order.argsort(1)  # from (processed, skipped) back to the tokens' own order

    def select(self, h: Array) -> Array:
        """Select the tokens to process, (b, num_processed, width), from all tokens h (b, n, width)."""
        return _select_tokens(h, self.processed)

    def merge(self, h: Array, all_tokens: Array) -> Array:
        """Return all tokens (b, n, width): h (b, num_processed, width), and the skipped ones of `all_tokens`."""
        skipped = _select_tokens(all_tokens, self.skipped)
        return _select_tokens(cat([h, skipped], 1), self.inverse)

    def select_rotary(self, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Select from rotary tables (n, size) those of the tokens to process: (b, 1, num_processed, size) each."""
        return tuple(table[self.processed].unsqueeze(1) for table in tables)

    def run_blocks(
        self, blocks: nn.ModuleList, h: Array, rotary: tuple[Tensor, ...], run_block: Callable[..., Array]
    ) -> Array:
        """Run the tokens h (b, n, width) through all blocks, which some of them skip, and return this shape.

        Block i is called as `run_block(i, block, h, *tables)`. The tables are those of `rotary`, (n, size) each, for
        the tokens that the block gets.
        """
        all_tokens = h  # as they were before the routed blocks
        block_tables = rotary
        is_split = False
        for i, block in enumerate(blocks):
            if block.is_routed and not is_split:
                is_split = True
                all_tokens = h
                h = self.select(h)
                block_tables = self.select_rotary(rotary)
            elif is_split and not block.is_routed:
                is_split = False
                h = self.merge(h, all_tokens)
                block_tables = rotary
            h = run_block(i, block, h, *block_tables)
        if is_split:
            h = self.merge(h, all_tokens)
        return h


def _select_tokens(h: Array, index: Tensor) -> Array:
    """Return the tokens of h (b, n, width) at the places `index` (b, k) of each row, (b, k, width)."""
    b, n, width = h.shape
    flat = (index + n * torch.arange(b, device=index.device)[:, None]).flatten()
    return h.flatten(0, 1).index_select(0, flat).view(b, -1, width)
