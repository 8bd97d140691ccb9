"""Token routing: in training some tokens skip the middle blocks (TREAD, Krause et al. 2025, arXiv 2501.04765).

Blocks `first` and on, all but the `last` ones, see a random part of each row's tokens. A block's cost is that of its
tokens: a guided exact step of XL/2 counts 4.95 F dense, 2.88 with half of them, 1.87 with a quarter (`dumo dry
imagenet256-xl2-routed`, and with `--set net.route.share=0.75`). The other tokens wait, and come back as they left.
There are no new weights. Sampling is dense.

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
from dumo.runtime.bound import BLOCKS
from dumo.types import Array, Spec, UserError

LAYER = 1  # whose keys these are: 0 are those of dropped words (`dumo.nets.text`)


class Route(Spec):
    """Which blocks are routed, and the share of the tokens that skip them. Defaults are TREAD's, for B/2 (its code)."""

    kind: Literal["tread"] = "tread"
    share: float = Field(ge=0, lt=1)  # TREAD: 0.5; 0: none skip
    first: int = Field(default=2, ge=0, le=BLOCKS)  # blocks at the start that see all tokens
    last: int = Field(default=3, ge=0, le=BLOCKS)  # blocks at the end that do

    def check(self, depth: int) -> None:
        """Raise UserError where a net of this depth has no block between."""
        if self.first + self.last >= depth:
            raise UserError(
                f"net.route leaves no block between the first {self.first} and the last {self.last} of {depth}: lower "
                "net.route.first or net.route.last, or set net.route=null"
            )

    def note(self, blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
        """Note in each block whether it is routed: parts of a net keep the note, and copies do. Raises as `check`."""
        self.check(len(blocks))
        for i, block in enumerate(blocks):
            block.routed = self.first <= i < len(blocks) - self.last  # pyright: ignore[reportArgumentType]

    def split(self, b: int, n: int) -> "Split | None":
        """How a pass of b rows parts its n tokens; None: all go through. Raises RuntimeError as `current`."""
        rows = current(b, route=True)
        return None if rows is None or not self.share else Split(rows, n, max(1, n - round(self.share * n)))


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
    blocks: nn.ModuleList,
    h: Array,
    places: tuple[Tensor, ...],
    step: Callable[..., Array],
    split: Split | None,
) -> Array:
    """The tokens h (b, n, width) after all blocks, by `step(number of the block, block, h, *places)`.

    Dense where `split` is None.
    """
    before = h  # the tokens as they were before the routed blocks
    block_places = places
    inside = False
    for i, block in enumerate(blocks):
        if split and block.routed and not inside:
            inside = True
            before = h
            h = split.part(h)
            block_places = split.places(places)
        elif split and inside and not block.routed:
            inside = False
            h = split.join(h, before)
            block_places = places
        h = step(i, block, h, *block_places)
    if split and inside:
        h = split.join(h, before)
    return h


class Routed(nn.Module):
    """A routed block of a model of diffusers in one pass, in its place: of the image's tokens it gets some.

    `ends`: whether it is the first of its kind, which parts the tokens, and whether it is the last, which joins them.
    What is computed again by checkpointing meets the same split: all is held here, and the block is as it was.
    """

    def __init__(self, block: nn.Module, split: Split, ends: tuple[bool, bool], before: list[Array]) -> None:
        """`before` is shared by the blocks of a pass: the tokens that the first of them got."""
        super().__init__()
        self.block, self.split, self.ends, self.before = block, split, ends, before
        self.lean = getattr(block, "lean", True)  # as `run_lean`

    def forward(self, hidden_states: Array, encoder_hidden_states: Array, temb: Array, *rest: Any, **named: Any) -> Any:  # noqa: ANN401, of diffusers
        """As the block: by name, or in order, where it is computed again. Text and image, (b, n, width) each."""
        h, tables = hidden_states, named.get("image_rotary_emb", rest[0] if rest else None)
        if self.ends[0]:
            self.before[:], h = [h], self.split.part(h)
        near = {"image_rotary_emb": tuple(Table(table, self.split) for table in tables)} if tables else {}
        text, h = self.block(hidden_states=h, encoder_hidden_states=encoder_hidden_states, temb=temb, **near)
        return text, self.split.join(h, *self.before) if self.ends[1] else h


class Table:
    """A rotary table of each row's own, of which code for one (n, size) asks [None, :, None, :], in diffusers."""

    def __init__(self, table: Tensor, split: Split) -> None:
        """Of a table (text and n, size): all of the text, and of the image what goes through."""
        (b, _), n = split.there.shape, split.back.shape[1]
        text = table[:-n].expand(b, -1, -1)
        self.rows = cat([text, table[-n:][split.there]], 1)

    def __getitem__(self, _: object) -> Tensor:
        """(b, tokens, 1, size)."""
        return self.rows.unsqueeze(2)


def standing(model: nn.Module, split: Split) -> dict[str, nn.ModuleList]:
    """The lists of blocks of a model of diffusers, by name, with the routed ones as they are in one pass."""
    lists = {name: part for name, part in model.named_children() if isinstance(part, nn.ModuleList)}
    routed = [block for blocks in lists.values() for block in blocks if block.routed]
    before = list[Array]()

    def stand(block: nn.Module) -> nn.Module:
        ends = block is routed[0], block is routed[-1]
        return Routed(block, split, ends, before) if block.routed else block

    return {name: nn.ModuleList(map(stand, blocks)) for name, blocks in lists.items()}


def chosen(h: Array, index: Tensor) -> Array:
    """Row by row the tokens of h (b, n, width) at index (b, k): (b, k, width)."""
    b, n, width = h.shape
    flat = (index + n * torch.arange(b, device=index.device)[:, None]).flatten()
    return h.flatten(0, 1).index_select(0, flat).view(b, -1, width)
