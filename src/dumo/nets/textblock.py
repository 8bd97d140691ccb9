"""Text conditioning of a DiT: cross-attention to text tokens in every block, and a pooled embedding like a class label.

`TextEmbedder` is called once per pass, and `TextBlock` once per layer. After self-attention the image tokens attend to
the text tokens, which are the same for every block (PixArt-alpha, Chen et al. 2023). A layer that is initialized to
zero adds the result.

A mask excludes padding. Only image tokens have rotary positions, because the text encoder has encoded the order of
words. Without a pooled embedding there is no vector: the mean of the tokens made generalization to new texts worse
(docs/log.md).
"""

from typing import ClassVar

from torch import nn
from torch.nn import functional as F

from dumo.nets.block import EPS, BlockSizes, Stream, multi_head_attention, normalize_qk, split_heads
from dumo.nets.text_rows import Texts
from dumo.types import Array, Cond


class TextEmbedder(nn.Module):
    """The projection of texts to the network's width. Tokens are normalized, because encoders differ in scale."""

    def __init__(self, texts: Texts, width: int) -> None:
        """Create a linear layer for the tokens, and one for a pooled embedding, initialized like a label table."""
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

        The vector replaces the embedding of a class. It is None without a pooled embedding, and the mask is None
        without padding.
        """
        tokens, mask, pooled = self.texts(c)
        y: Array = self.token(tokens.to(self.token.weight.dtype))
        y = F.rms_norm(y, y.shape[-1:], eps=EPS)
        vector: Array | None = None
        if self.pool is not None and pooled is not None:
            vector = self.pool(pooled.to(y.dtype))
        return vector, y, mask


class TextKeysValues(nn.Module):
    """The layers for keys and values of a text, for one block."""

    # The number of matrices in a layer's weight (`Stream.fused`).
    fused: ClassVar[dict[str, int]] = {"kv": 2}

    def __init__(self, sizes: BlockSizes) -> None:
        """Create the layers for a block of these sizes."""
        super().__init__()
        self.attention = sizes.attention
        self.kv = nn.Linear(sizes.width, 2 * sizes.width)
        self.k_norm = sizes.qk_norm_layer()

    def forward(self, y: Array) -> tuple[Array, Array]:
        """Return keys and values, each (b, attention, l, size), for tokens y (b, l, width)."""
        k, v = split_heads(self.kv(y), 2, self.attention)
        return normalize_qk(k, self.k_norm, v), v


class TextBlock(Stream):
    """A block with cross-attention to a text, between self-attention and MLP."""

    def __init__(self, sizes: BlockSizes) -> None:
        """Create a block of these sizes. Its cross-attention layers are `query`, `keys` and `read`."""
        super().__init__(sizes)
        self.query = nn.Linear(sizes.width, sizes.width)
        self.read = nn.Linear(sizes.width, sizes.width)
        self.query_norm = sizes.qk_norm_layer()
        self.keys = TextKeysValues(sizes)

    @property
    def zero_layers(self) -> tuple[nn.Linear, ...]:
        """The layers that are initialized to zero."""
        return (*super().zero_layers, self.read)

    def forward(self, h: Array, condition: Array, y: Array, mask: Array | None, *rotary: Array) -> Array:
        """Return h (b, tokens, width) after self-attention, cross-attention to the text y (b, l, width), and the MLP.

        condition: (b, width), after its SiLU.
        mask: (b, l), False for padding; None means no padding.
        rotary: the tables of the image's positions, if any.
        """
        attention_modulation, perceptron_modulation = self.modulations(condition)
        h = self.add_attention(h, attention_modulation, *rotary)

        # Attend to the text.
        (q,) = split_heads(self.query(h), 1, self.attention)
        k, v = self.keys(y)
        q = normalize_qk(q, self.query_norm, v)
        h = h + self.read(multi_head_attention(q, k, v, mask))

        return self.add_perceptron(h, perceptron_modulation)
