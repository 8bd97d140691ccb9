"""Token routing: in training some tokens skip the middle blocks (TREAD, Krause et al. 2025, arXiv 2501.04765).

Blocks `first` and on, all but the `last` ones, see a random part of each row's tokens. A block's cost is that of its
tokens: a guided exact step of XL/2 counts 4.95 F dense, 2.88 with half of them, 1.87 with a quarter (`dumo dry
imagenet256-xl2-routed`, and with `--set net.route.share=0.75`). The other tokens wait, and come back as they left.
There are no new weights. Sampling is dense.

The order of events: `Route.note` marks the blocks of a net once. In each pass `Route.split` draws which tokens skip. A
DiT then calls `run_blocks`; a model of diffusers runs with the blocks of `blocks_with_routing` instead of its own.

What this assumes:

- Which tokens skip is a function of row and step alone, by the keys of `dumo.flow.dropout`. So every pass of a step has
  the same: the one with gradients, V(c), V(null), and du/dt, which is then the derivative of the function that is
  trained. Under guidance `dropout.off` leaves routing on. TREAD, which has one pass a step, needs no such key.
- The tangent moves with its token: part and join are selections, of which the tangents' are the same selections.
- A target is one of the routed net, for that is the one whose passes make it. An average as theta^- is dense, as it is
  in the mode of sampling: its derivative is the dense function's.
- Tokens know their places before they are parted: waves are in them, and rotary tables are parted alike.
- As many tokens skip in every row, so shapes are static.
- A transformer of diffusers routes over all of its lists of blocks. Its text is never routed.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, cat, nn

from dumo.flow.dropout import Keys, current, hashes, layer_keys
from dumo.runtime.limits import BLOCKS
from dumo.types import Array, Spec, UserError

_KEY_LAYER = 1  # the keys of `dumo.flow.dropout` for routing; 0 are those of dropped words (`dumo.nets.text`)


class Route(Spec):
    """Which blocks are routed, and the share of the tokens that skip them. Defaults are TREAD's, for B/2 (its code)."""

    kind: Literal["tread"] = "tread"
    share: float = Field(ge=0, lt=1)  # TREAD: 0.5; 0: none skip
    first: int = Field(default=2, ge=0, le=BLOCKS)  # blocks at the start that see all tokens
    last: int = Field(default=3, ge=0, le=BLOCKS)  # blocks at the end that do

    def check(self, depth: int) -> None:
        """Raise UserError where a net of `depth` blocks has none between the first and the last."""
        if self.first + self.last >= depth:
            raise UserError(
                f"net.route leaves no block between the first {self.first} and the last {self.last} of {depth}: lower "
                "net.route.first or net.route.last, or set net.route=null"
            )

    def note(self, blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
        """Set `routed` in each block, which parts and copies of a net keep. Raises UserError as `check`."""
        self.check(len(blocks))
        for i, block in enumerate(blocks):
            block.routed = self.first <= i < len(blocks) - self.last  # pyright: ignore[reportArgumentType]

    def split(self, b: int, n: int) -> "TokenSplit | None":
        """Draw which of n tokens skip in each of b rows; None: none does. Raises RuntimeError as `dropout.current`."""
        rows = current(b, route=True)
        if rows is None or not self.share:
            return None
        num_through = max(1, n - round(self.share * n))
        return TokenSplit(rows, n, num_through)


class TokenSplit:
    """Which tokens of a pass go through the routed blocks, and which skip."""

    def __init__(self, rows: Keys, n: int, num_through: int) -> None:
        """`num_through` of the n tokens of each row go through, drawn by the keys of the rows."""
        order = hashes(layer_keys(rows, _KEY_LAYER), n).argsort(1)
        self.through = order[:, :num_through]
        self.skipping = order[:, num_through:]
        self.inverse = order.argsort(1)

    def part(self, h: Array) -> Array:
        """Select the tokens that go through, (b, num_through, width), of h (b, n, width)."""
        return _select_tokens(h, self.through)

    def join(self, h: Array, before: Array) -> Array:
        """Put h (b, num_through, width) back to its places among the tokens of `before` (b, n, width) that skipped."""
        return _select_tokens(cat([h, _select_tokens(before, self.skipping)], 1), self.inverse)

    def select_rotary(self, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Select from rotary tables (n, size) the rows of tokens that go through: (b, 1, num_through, size) each."""
        return tuple(table[self.through].unsqueeze(1) for table in tables)


def run_blocks(
    blocks: nn.ModuleList,
    h: Array,
    rotary: tuple[Tensor, ...],
    run_block: Callable[..., Array],
    split: TokenSplit | None,
) -> Array:
    """Run the tokens h (b, n, width) through all blocks, and return this shape.

    Block i is called as `run_block(i, block, h, *tables)`. The tables are those of `rotary`, (n, size) each, for the
    tokens that the block gets. Where `split` is None, all tokens go through all blocks.
    """
    before = h  # the tokens as they were before the routed blocks
    block_tables = rotary
    inside = False
    for i, block in enumerate(blocks):
        if split and block.routed and not inside:
            inside = True
            before = h
            h = split.part(h)
            block_tables = split.select_rotary(rotary)
        elif split and inside and not block.routed:
            inside = False
            h = split.join(h, before)
            block_tables = rotary
        h = run_block(i, block, h, *block_tables)
    if split and inside:
        h = split.join(h, before)
    return h


class _RoutedBlock(nn.Module):
    """Stands for a routed block of a model of diffusers in one pass: the block gets the image tokens that go through.

    What is computed again by checkpointing meets the same split: all is held here, and the block is unchanged.
    """

    def __init__(
        self, block: nn.Module, split: TokenSplit, before: list[Array], *, is_first: bool, is_last: bool
    ) -> None:
        """The first routed block parts the tokens, the last joins them. `before`, shared by all, holds all tokens."""
        super().__init__()
        self.block = block
        self.split = split
        self.before = before
        self.is_first = is_first
        self.is_last = is_last
        self.recomputed = getattr(block, "recomputed", True)  # as `block.run_as_marked`

    def forward(self, hidden_states: Array, encoder_hidden_states: Array, temb: Array, *rest: Any, **named: Any) -> Any:  # noqa: ANN401, of diffusers
        """Run the block on image and text, (b, n, width) each, and return text and image.

        The rotary table comes by name, or first in `rest`, where the block is computed again.
        """
        h = hidden_states
        tables = named.get("image_rotary_emb", rest[0] if rest else None)
        if self.is_first:
            self.before[:] = [h]
            h = self.split.part(h)
        rotary: dict[str, Any] = {}
        if tables:
            rotary["image_rotary_emb"] = tuple(_RotaryTablePerRow(table, self.split) for table in tables)
        text, h = self.block(hidden_states=h, encoder_hidden_states=encoder_hidden_states, temb=temb, **rotary)
        if self.is_last:
            h = self.split.join(h, *self.before)
        return text, h


class _RotaryTablePerRow:
    """A rotary table for each row, in diffusers' code for a single table (n, size), which asks [None, :, None, :]."""

    def __init__(self, table: Tensor, split: TokenSplit) -> None:
        """Select from a table (text and n, size) all of the text, and the image tokens that go through."""
        b = split.through.shape[0]
        n = split.inverse.shape[1]
        text = table[:-n].expand(b, -1, -1)
        self.rows = cat([text, table[-n:][split.through]], 1)

    def __getitem__(self, _: object) -> Tensor:
        """The tables (b, tokens, 1, size), whatever the index is."""
        return self.rows.unsqueeze(2)


def blocks_with_routing(model: nn.Module, split: TokenSplit) -> dict[str, nn.ModuleList]:
    """The lists of blocks of a model of diffusers for one pass, by name, with its routed blocks wrapped."""
    lists = {name: part for name, part in model.named_children() if isinstance(part, nn.ModuleList)}
    routed = [block for blocks in lists.values() for block in blocks if block.routed]
    before: list[Array] = []

    def wrap(block: nn.Module) -> nn.Module:
        if not block.routed:
            return block
        return _RoutedBlock(block, split, before, is_first=block is routed[0], is_last=block is routed[-1])

    return {name: nn.ModuleList(map(wrap, blocks)) for name, blocks in lists.items()}


def _select_tokens(h: Array, index: Tensor) -> Array:
    """Select, row by row, the tokens of h (b, n, width) at index (b, k): (b, k, width)."""
    b, n, width = h.shape
    flat = (index + n * torch.arange(b, device=index.device)[:, None]).flatten()
    return h.flatten(0, 1).index_select(0, flat).view(b, -1, width)
