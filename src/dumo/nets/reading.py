"""How a DiT reads a text: token by token in every block, and its pooled embedding in the place of a class's label.

cross   After self-attention the image's tokens attend to the text's, which are the same for every block (PixArt-alpha,
        Chen et al. 2023). What they find is added, by a layer that is zero at the start.
joint   The text's tokens stand behind the image's, with a modulation, projections and a perceptron of their own, and
        both attend to both (MMDiT, Esser et al. 2024). Of the last block's text only keys and values are of use.

A mask says which tokens are there, so how far texts are padded changes nothing. Only the image has rotary positions: a
text's encoder knows the order of the words. Where the encoder has no pooled embedding there is no vector: the mean of
the tokens in its place made texts that were never seen harder to read (docs/log.md).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from dumo.nets.block import Sizes, Stream, mix, parted, unit
from dumo.nets.norm import EPS, modulated
from dumo.nets.text.rows import Texts
from dumo.types import Array, Cond

Way = Literal["cross", "joint"]


class TextEmbedder(nn.Module):
    """What texts tell a net of its width. Tokens have mean square 1, for encoders differ a hundredfold in scale."""

    def __init__(self, texts: Texts, width: int, way: Way) -> None:
        """A linear layer for the tokens, and one for a pooled embedding, which starts as a label does: N(0, 0.02^2)."""
        super().__init__()
        self.texts = texts
        self.way: Way = way
        self.token = nn.Linear(texts.width, width)
        nn.init.xavier_uniform_(self.token.weight)
        nn.init.zeros_(self.token.bias)
        self.pool = nn.Linear(texts.pooled_width, width) if texts.pooled_width else None
        if self.pool is not None:
            nn.init.normal_(self.pool.weight, std=0.02)
            nn.init.zeros_(self.pool.bias)

    def forward(self, h: Array, c: Cond) -> tuple[Array, Array | None, tuple[Array | None, ...]]:
        """Of an image h (b, tokens, width) and the texts c (b,): what goes into the first block, the vector (b, width)
        in the place of a label, of the pooled embedding if there is one, and what all blocks are told beside them.
        """
        tokens, mask, pooled = self.texts(c)
        y: Array = self.token(tokens.to(self.token.weight.dtype))
        y = F.rms_norm(y, y.shape[-1:], eps=EPS)
        vector = None if self.pool is None or pooled is None else self.pool(pooled.to(y.dtype))
        if self.way == "cross":
            return h, vector, (y, mask)
        there = None if mask is None else torch.cat([mask.new_ones(h.shape[:2]), mask], 1)
        return torch.cat([h, y], 1), vector, (there,)


class Keys(nn.Module):
    """Keys and values of a text that asks nothing itself."""

    fused: ClassVar[dict[str, int]] = {"kv": 2}  # as of `Stream`

    def __init__(self, sizes: Sizes) -> None:
        """Of the block that asks."""
        super().__init__()
        self.attention, self.kv, self.k_norm = sizes.attention, nn.Linear(sizes.width, 2 * sizes.width), sizes.gains()

    def forward(self, y: Array) -> tuple[Array, Array]:
        """Of tokens y (b, l, width), each (b, attention, l, size)."""
        k, v = parted(self.kv(y), 2, self.attention)
        return unit(k, self.k_norm, v), v


class Cross(Stream):
    """A block whose image looks at a text, too: between attention to itself and the perceptron."""

    def __init__(self, sizes: Sizes) -> None:
        """As `Block`."""
        super().__init__(sizes)
        self.query, self.read = (nn.Linear(sizes.width, sizes.width) for _ in range(2))
        self.query_norm, self.keys = sizes.gains(), Keys(sizes)

    @property
    def silent(self) -> tuple[nn.Linear, ...]:
        """Layers that start at zero."""
        return (*super().silent, self.read)

    def forward(self, h: Array, e: Array, y: Array, mask: Array | None, *places: Array) -> Array:
        """As `Block`; y (b, l, width) is the text, of which `mask` (b, l) says which tokens are there."""
        first, second = self.modulations(e)
        h = self.look(h, first, *places)
        (q,), (k, v) = parted(self.query(h), 1, self.attention), self.keys(y)
        h = h + self.read(mix(unit(q, self.query_norm, v), k, v, mask))
        return self.think(h, second)


class Joint(Stream):
    """A block of two streams, image and text, that attend to both."""

    def __init__(self, sizes: Sizes, tokens: int) -> None:
        """As `Block`; the image has so many `tokens`."""
        super().__init__(sizes)
        self.tokens, self.text = tokens, Stream(sizes)

    def forward(self, h: Array, e: Array, mask: Array | None, *places: Array) -> Array:
        """As `Block`; h is the image and the text behind it, and `mask` (b, all) says which tokens are there."""
        n, text = self.tokens, self.text
        x, y = h[:, :n], h[:, n:]
        (first, second), (third, fourth) = self.modulations(e), text.modulations(e)
        both = zip(self.project(self.shown(x, first), *places), text.project(text.shown(y, third)), strict=True)
        q, k, v = (torch.cat([*pair], 2) for pair in both)
        a = mix(q, k, v, mask)
        x = self.think(x + first.gate * self.out(a[:, :n]), second)
        y = text.think(y + third.gate * text.out(a[:, n:]), fourth)
        return torch.cat([x, y], 1)


class Last(Stream):
    """The last of them, of whose text nobody asks more than keys and values: it has no further parameters."""

    def __init__(self, sizes: Sizes, tokens: int) -> None:
        """As `Joint`."""
        super().__init__(sizes)
        self.tokens, self.text_modulation, self.keys = tokens, nn.Linear(sizes.width, 2 * sizes.width), Keys(sizes)

    @property
    def silent(self) -> tuple[nn.Linear, ...]:
        """Layers that start at zero."""
        return (*super().silent, self.text_modulation)

    @property
    def fused(self) -> dict[str, int]:
        """As of `Stream`."""
        return {**super().fused, "text_modulation": 2}

    def forward(self, h: Array, e: Array, mask: Array | None, *places: Array) -> Array:
        """As `Joint`; returns the image alone."""
        x, y = h[:, : self.tokens], h[:, self.tokens :]
        first, second = self.modulations(e)
        shift, scale = self.text_modulation(e).unsqueeze(1).chunk(2, -1)
        q, *own = self.project(self.shown(x, first), *places)
        told = self.keys(modulated(y, self.norm, shift, scale))
        k, v = (torch.cat([*pair], 2) for pair in zip(own, told, strict=True))
        return self.think(x + first.gate * self.out(mix(q, k, v, mask)), second)


def blocks(way: Way, depth: int, sizes: Sizes, tokens: int) -> Sequence[Stream]:
    """The blocks of a net that reads texts; its image has so many `tokens`."""
    if way == "cross":
        return [Cross(sizes) for _ in range(depth)]
    return [*(Joint(sizes, tokens) for _ in range(depth - 1)), Last(sizes, tokens)]
