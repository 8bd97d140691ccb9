"""How a DiT reads a text: the tokens by attention in every block, the pooled embedding as a class's label is read.

After self-attention the image's tokens attend to the text's, which are the same for every block (PixArt-alpha, Chen et
al. 2023). A layer that is zero at the start adds the result.

A mask says which tokens are there, so padding changes nothing. Only the image has rotary positions: the text's encoder
knows the order of the words. Without a pooled embedding there is no vector: the mean of the tokens made unseen texts
harder to read (docs/log.md).
"""

from typing import ClassVar

from torch import nn
from torch.nn import functional as F

from dumo.nets.block import EPS, BlockSizes, Stream, mix, parted, unit
from dumo.nets.rows import Texts
from dumo.types import Array, Cond


class TextEmbedder(nn.Module):
    """Texts in the width of the net. Tokens have mean square 1, because encoders differ a hundredfold in scale."""

    def __init__(self, texts: Texts, width: int) -> None:
        """A linear layer for the tokens, and one for a pooled embedding, which starts as a label does: N(0, 0.02^2)."""
        super().__init__()
        self.texts = texts
        self.token = nn.Linear(texts.width, width)
        nn.init.xavier_uniform_(self.token.weight)
        nn.init.zeros_(self.token.bias)
        self.pool = nn.Linear(texts.pooled_width, width) if texts.pooled_width else None
        if self.pool is not None:
            nn.init.normal_(self.pool.weight, std=0.02)
            nn.init.zeros_(self.pool.bias)

    def forward(self, c: Cond) -> tuple[Array | None, Array, Array | None]:
        """For texts c (b,): the vector (b, width) that replaces a label, tokens (b, l, width), their mask (b, l)."""
        tokens, mask, pooled = self.texts(c)
        y: Array = self.token(tokens.to(self.token.weight.dtype))
        y = F.rms_norm(y, y.shape[-1:], eps=EPS)
        vector = None if self.pool is None or pooled is None else self.pool(pooled.to(y.dtype))
        return vector, y, mask


class Keys(nn.Module):
    """Keys and values of a text."""

    fused: ClassVar[dict[str, int]] = {"kv": 2}  # as `Stream.fused`

    def __init__(self, sizes: BlockSizes) -> None:
        """For a block of these sizes."""
        super().__init__()
        self.attention, self.kv, self.k_norm = sizes.attention, nn.Linear(sizes.width, 2 * sizes.width), sizes.gains()

    def forward(self, y: Array) -> tuple[Array, Array]:
        """From tokens y (b, l, width), each (b, attention, l, size)."""
        k, v = parted(self.kv(y), 2, self.attention)
        return unit(k, self.k_norm, v), v


class Cross(Stream):
    """A block in which the image attends to a text as well, between self-attention and perceptron."""

    def __init__(self, sizes: BlockSizes) -> None:
        """For a net of these sizes."""
        super().__init__(sizes)
        self.query, self.read = (nn.Linear(sizes.width, sizes.width) for _ in range(2))
        self.query_norm, self.keys = sizes.gains(), Keys(sizes)

    @property
    def silent(self) -> tuple[nn.Linear, ...]:
        """Layers that start at zero."""
        return (*super().silent, self.read)

    def forward(self, h: Array, e: Array, y: Array, mask: Array | None, *places: Array) -> Array:
        """h, e and places as for `Block`; y (b, l, width) is the text, and `mask` (b, l) says which tokens it has."""
        first, second = self.modulations(e)
        h = self.look(h, first, *places)
        (q,), (k, v) = parted(self.query(h), 1, self.attention), self.keys(y)
        h = h + self.read(mix(unit(q, self.query_norm, v), k, v, mask))
        return self.think(h, second)
