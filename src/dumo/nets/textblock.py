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

from dumo.nets.block import EPS, BlockSizes, Stream, attention_of, normalize_qk, split_heads
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
        self.attention = sizes.attention
        self.kv = nn.Linear(sizes.width, 2 * sizes.width)
        self.k_norm = sizes.qk_norm_layer()

    def forward(self, y: Array) -> tuple[Array, Array]:
        """From tokens y (b, l, width), each (b, attention, l, size)."""
        k, v = split_heads(self.kv(y), 2, self.attention)
        return normalize_qk(k, self.k_norm, v), v


class Cross(Stream):
    """A block in which the image attends to a text as well, between self-attention and perceptron."""

    def __init__(self, sizes: BlockSizes) -> None:
        """For a net of these sizes."""
        super().__init__(sizes)
        self.query = nn.Linear(sizes.width, sizes.width)
        self.read = nn.Linear(sizes.width, sizes.width)
        self.query_norm = sizes.qk_norm_layer()
        self.keys = Keys(sizes)

    @property
    def zero_layers(self) -> tuple[nn.Linear, ...]:
        """Layers that start at zero."""
        return (*super().zero_layers, self.read)

    def forward(self, h: Array, e: Array, y: Array, mask: Array | None, *places: Array) -> Array:
        """h, e and places as for `Block`; y (b, l, width) is the text, and `mask` (b, l) says which tokens it has."""
        of_attention, of_perceptron = self.modulations(e)
        h = self.add_attention(h, of_attention, *places)
        (q,) = split_heads(self.query(h), 1, self.attention)
        k, v = self.keys(y)
        q = normalize_qk(q, self.query_norm, v)
        h = h + self.read(attention_of(q, k, v, mask))
        return self.add_perceptron(h, of_perceptron)
