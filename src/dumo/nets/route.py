"""Token routing (TREAD, Krause et al. 2025, arXiv 2501.04765): in training some tokens skip the middle blocks.

Blocks `first` and on, all but the `last` ones, see a random part of each row's tokens. The other tokens wait, and come
back as they left. A block's cost is that of its tokens, so with half of them a guided exact step of XL/2 counts 0.58.
There are no new weights, and sampling is dense.

What this assumes:

- Which tokens skip is a function of row and step alone, by the keys of `dumo.flow.dropout`. So every pass of a step has
  the same: the one with gradients, V(c), V(null), and du/dt, which is then the derivative of the function that is
  trained. Under guidance `dropout.off` leaves routing on. TREAD, which has one pass a step, needs no such key.
- The tangent moves with its token: part and join are selections, of which the tangents' are the same selections.
- A target is one of the routed net, for that is the one whose passes make it. An average as theta^- is dense, as it is
  in the mode of sampling: its derivative is the dense function's.
- Tokens know their places before they are parted: waves are in them, and rotary tables are parted alike.
- As many tokens skip in every row, so shapes are static.
"""

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor, cat, nn

from dumo.flow.dropout import Keys, current, hashes, layer_keys
from dumo.runtime.bound import BLOCKS
from dumo.types import Array, Spec, UserError

LAYER = 1  # whose keys these are: 0 are those of dropped words (`dumo.nets.text`)


class Route(Spec):
    """Which blocks are routed, and the share of the tokens that skip them. Defaults are TREAD's, for B/2 (its code)."""

    share: float = Field(gt=0, lt=1)  # TREAD: 0.5
    first: int = Field(default=2, ge=0, le=BLOCKS)  # blocks at the start that see all tokens
    last: int = Field(default=3, ge=0, le=BLOCKS)  # blocks at the end that do

    def check(self, depth: int) -> None:
        """Raise UserError where a net of this depth has no block between."""
        if self.first + self.last >= depth:
            raise UserError(
                f"net.route leaves no block between the first {self.first} and the last {self.last} of {depth}: lower "
                "net.route.first or net.route.last, or set net.route=null"
            )

    def note(self, blocks: nn.ModuleList) -> None:
        """Note in each block whether it is routed: parts of a net keep the note, and copies do."""
        for i, block in enumerate(blocks):
            block.routed = self.first <= i < len(blocks) - self.last  # pyright: ignore[reportArgumentType]

    def split(self, h: Array) -> "Split | None":
        """How this pass parts the tokens h (b, n, width); None: all go through. Raises RuntimeError as `current`."""
        rows, n = current(len(h), route=True), h.shape[1]
        return None if rows is None else Split(rows, n, max(1, n - round(self.share * n)))


class Split:
    """Which tokens of a pass go through the routed blocks, and which skip."""

    def __init__(self, rows: Keys, n: int, through: int) -> None:
        """`through` of the n tokens of each row go through."""
        order = hashes(layer_keys(rows, LAYER), n).argsort(1)
        self.there, self.skipping, self.back = order[:, :through], order[:, through:], order.argsort(1)

    def part(self, h: Array) -> Array:
        """Of (b, n, width) the tokens that go through, (b, through, width)."""
        return chosen(h, self.there)

    def join(self, h: Array, before: Array) -> Array:
        """(b, n, width): h (b, through, width), and of `before` (b, n, width) what skipped, at their places."""
        return chosen(cat([h, chosen(before, self.skipping)], 1), self.back)

    def places(self, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Rotary tables (n, size) of the tokens that go through, one for each row: (b, 1, through, size)."""
        return tuple(table[self.there].unsqueeze(1) for table in tables)


def through(
    blocks: nn.ModuleList, h: Array, places: tuple[Tensor, ...], step: Callable[..., Array], route: Route | None
) -> Array:
    """The tokens h (b, n, width) after all blocks, by `step(number of the block, block, h, *places)`; None: dense."""
    split, before, near, inside = route and route.split(h), h, places, False
    for i, block in enumerate(blocks):
        if split and block.routed != inside:
            inside = not inside
            before, h = (h, split.part(h)) if inside else (before, split.join(h, before))
            near = split.places(places) if inside else places
        h = step(i, block, h, *near)
    return split.join(h, before) if split and inside else h


def chosen(h: Array, index: Tensor) -> Array:
    """Row by row the tokens of h (b, n, width) at index (b, k): (b, k, width)."""
    b, n, width = h.shape
    flat = (index + n * torch.arange(b, device=index.device)[:, None]).flatten()
    return h.flatten(0, 1).index_select(0, flat).view(b, -1, width)
