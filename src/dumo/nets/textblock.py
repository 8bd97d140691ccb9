"""How a DiT reads a text: the tokens by attention in every block, the pooled embedding as a class's label is read.

`TextEmbedder` is called once in a pass, and `TextBlock` once per layer; `dumo.nets.dit` makes both. After
self-attention the image's tokens attend to the text's, which are the same for every block (PixArt-alpha, Chen et al.
2023). A layer that is zero at the start adds the result.

A mask says which tokens are there, so padding changes nothing. Only the image has rotary positions: the text's encoder
knows the order of the words. Without a pooled embedding there is no vector: the mean of the tokens made unseen texts
harder to read (docs/log.md).
"""

from typing import ClassVar

from torch import nn
from torch.nn import functional as F

from dumo.nets.block import EPS, BlockSizes, Stream, multi_head_attention, normalize_qk, split_heads
from dumo.nets.text_rows import Texts
from dumo.types import Array, Cond


class TextEmbedder(nn.Module):
    """Maps texts to the width of the net. Tokens get mean square 1, because encoders differ a hundredfold in scale."""

    def __init__(self, texts: Texts, width: int) -> None:
        """Make a linear layer for the tokens, and one for a pooled embedding, from N(0, 0.02^2) as a label's table."""
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
        """Look up the texts of c (b,), and return a vector (b, width), tokens (b, l, width) and their mask (b, l).

        The vector takes the place of a class's label. It is None without a pooled embedding, and the mask is None where
        no row is padded.
        """
        tokens, mask, pooled = self.texts(c)
        y: Array = self.token(tokens.to(self.token.weight.dtype))
        y = F.rms_norm(y, y.shape[-1:], eps=EPS)
        vector: Array | None = None
        if self.pool is not None and pooled is not None:
            vector = self.pool(pooled.to(y.dtype))
        return vector, y, mask


class TextKeysValues(nn.Module):
    """The layers that make keys and values of a text, for one block."""

    fused: ClassVar[dict[str, int]] = {"kv": 2}  # the number of matrices in a layer's weight (`Stream.fused`)

    def __init__(self, sizes: BlockSizes) -> None:
        """Make the layers of keys and values, for a block of these sizes."""
        super().__init__()
        self.attention = sizes.attention
        self.kv = nn.Linear(sizes.width, 2 * sizes.width)
        self.k_norm = sizes.qk_norm_layer()

    def forward(self, y: Array) -> tuple[Array, Array]:
        """Return keys and values, each (b, attention, l, size), of tokens y (b, l, width)."""
        k, v = split_heads(self.kv(y), 2, self.attention)
        return normalize_qk(k, self.k_norm, v), v


class TextBlock(Stream):
    """A block in which the image attends to a text as well, between self-attention and perceptron."""

    def __init__(self, sizes: BlockSizes) -> None:
        """Make a block of these sizes. Its text layers are `query`, `keys` and `read`."""
        super().__init__(sizes)
        self.query = nn.Linear(sizes.width, sizes.width)
        self.read = nn.Linear(sizes.width, sizes.width)
        self.query_norm = sizes.qk_norm_layer()
        self.keys = TextKeysValues(sizes)

    @property
    def zero_layers(self) -> tuple[nn.Linear, ...]:
        """The layers that start at zero."""
        return (*super().zero_layers, self.read)

    def forward(self, h: Array, condition: Array, y: Array, mask: Array | None, *rotary: Array) -> Array:
        """Return h (b, tokens, width) after self-attention, attention to the text y (b, l, width), and the perceptron.

        The condition (b, width) has had its SiLU. `mask` (b, l) says which tokens the text has; None: all. `rotary` are
        the tables of the image's positions, or nothing.
        """
        attention_modulation, perceptron_modulation = self.modulations(condition)
        h = self.add_attention(h, attention_modulation, *rotary)

        # attention to the text
        (q,) = split_heads(self.query(h), 1, self.attention)
        k, v = self.keys(y)
        q = normalize_qk(q, self.query_norm, v)
        h = h + self.read(multi_head_attention(q, k, v, mask))

        return self.add_perceptron(h, perceptron_modulation)
