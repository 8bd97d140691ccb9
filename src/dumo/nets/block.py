"""The DiT block: self-attention and an MLP, modulated by a condition (Peebles & Xie 2023).

Modern blocks are LightningDiT's (Yao et al. 2025): RMS norms (Zhang & Sennrich 2019), query and key norms (Dehghani et
al. 2023), SwiGLU with the same number of parameters (Shazeer 2020), and rotary positions.

`Stream` contains the layers and the steps of a `Block`:

1. `modulations` computes a shift, a scale and a gate from the condition, for attention and for the MLP.
2. `add_attention`: h + gate * attention(modulated norm of h).
3. `add_perceptron`: h + gate * mlp(modulated norm of h).

`dumo.nets.magnitude` extends it to a block that preserves magnitudes, and `dumo.nets.textblock` to one with
cross-attention to a text between 2 and 3. They and `dumo.nets.dit` share the functions below `Block`.

In shapes, b is the batch size, tokens the number of tokens, attention the number of attention heads, and size the width
of a head. Layer names are the keys in checkpoints, so renaming them breaks runs.
"""

from typing import NamedTuple

from torch import nn
from torch.nn import functional as F

from dumo.nets.embed import apply_rotary
from dumo.types import Array

# eps of all norms (DiT).
EPS = 1e-6


class BlockSizes(NamedTuple):
    """The sizes and options of a block, as in `DiT`. Modern blocks have query and key norms without `qk_norm`."""

    width: int
    attention: int
    modern: bool = False
    qk_norm: bool = False

    def qk_norm_layer(self) -> nn.RMSNorm | None:
        """Make a norm of queries or keys, with a weight per channel of a head, or None without such norms."""
        if not (self.modern or self.qk_norm):
            return None
        return nn.RMSNorm(self.width // self.attention, eps=EPS)


class Modulation(NamedTuple):
    """The shift, scale and gate of a layer, each (b, 1, width)."""

    shift: Array
    scale: Array
    gate: Array


class Stream(nn.Module):
    """The layers of a block for one stream of tokens. Their gates start at zero (adaLN-zero)."""

    def __init__(self, sizes: BlockSizes) -> None:
        """Make the layers. The perceptron is four times as wide as the block, or `swiglu_width` if modern."""
        super().__init__()
        width = sizes.width
        self.modern = sizes.modern
        self.attention = sizes.attention
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        hidden = swiglu_width(width) if self.modern else 4 * width
        self.up = nn.Linear(width, 2 * hidden if self.modern else hidden)
        self.down = nn.Linear(hidden, width)
        self.q_norm = sizes.qk_norm_layer()
        self.k_norm = sizes.qk_norm_layer()

    @property
    def zero_layers(self) -> tuple[nn.Linear, ...]:
        """The layers that start at zero."""
        return (self.modulation,)

    @property
    def fused(self) -> dict[str, int]:
        """The number of matrices that are stacked in the weight of a layer. Muon orthogonalizes each separately."""
        return {"modulation": 6, "qkv": 3, "up": 2 if self.modern else 1}

    def modulations(self, condition: Array) -> tuple[Modulation, Modulation]:
        """Return the modulation of attention and that of the perceptron, from the condition (b, width)."""
        parts = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def add_attention(self, h: Array, m: Modulation, *rotary: Array) -> Array:
        """Add gated attention to h (b, tokens, width)."""
        a = self.attend(self.layer_input(h, m), *rotary)
        return h + m.gate * a

    def add_perceptron(self, h: Array, m: Modulation) -> Array:
        """Add the gated perceptron to h (b, tokens, width)."""
        a = self.apply_perceptron(self.layer_input(h, m))
        return h + m.gate * a

    def layer_input(self, h: Array, m: Modulation) -> Array:
        """Normalize and modulate h (b, tokens, width): the input of attention or of the perceptron."""
        return normalize_and_modulate(h, m.shift, m.scale, rms=self.modern)

    def attend(self, a: Array, *rotary: Array) -> Array:
        """Apply self-attention over the tokens of a (b, tokens, width); returns this shape."""
        q, k, v = self.project(a, *rotary)
        return self.out(multi_head_attention(q, k, v))

    def project(self, a: Array, *rotary: Array) -> tuple[Array, Array, Array]:
        """Return queries, keys and values, each (b, attention, tokens, size), of a (b, tokens, width).

        rotary: the tables of `rotary_tables`, if any.
        """
        q, k, v = split_heads(self.qkv(a), 3, self.attention)
        q = normalize_qk(q, self.q_norm, v)
        k = normalize_qk(k, self.k_norm, v)
        if rotary:
            q = apply_rotary(q, *rotary)
            k = apply_rotary(k, *rotary)
        return q, k, v

    def apply_perceptron(self, a: Array) -> Array:
        """Apply the perceptron to each token of a (b, tokens, width); returns this shape."""
        if not self.modern:
            return self.down(F.gelu(self.up(a), approximate="tanh"))
        gate, up = self.up(a).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(Stream):
    """A block with self-attention only."""

    def forward(self, h: Array, condition: Array, *rotary: Array) -> Array:
        """Return h (b, tokens, width) after attention and the perceptron.

        condition: (b, width), after its SiLU.
        rotary: the tables of `rotary_tables`, if any.
        """
        attention_modulation, perceptron_modulation = self.modulations(condition)
        h = self.add_attention(h, attention_modulation, *rotary)
        return self.add_perceptron(h, perceptron_modulation)


def normalize(h: Array, *, rms: bool = False) -> Array:
    """Normalize the last axis, without weights: to mean 0 and variance 1, or with `rms` to mean square 1."""
    if rms:
        return F.rms_norm(h, h.shape[-1:], eps=EPS)
    return F.layer_norm(h, h.shape[-1:], eps=EPS)


def normalize_and_modulate(h: Array, shift: Array, scale: Array, *, rms: bool) -> Array:
    """Normalize h (b, tokens, width), then scale it by 1 + scale and shift it. Shift and scale are (b, 1, width)."""
    return normalize(h, rms=rms) * (1 + scale) + shift


def split_heads(a: Array, parts: int, attention: int) -> tuple[Array, ...]:
    """Split a (b, tokens, parts * width) into `parts` tensors (b, attention, tokens, size), such as q, k and v."""
    size = a.shape[-1] // (parts * attention)
    return a.view(*a.shape[:2], parts, attention, size).permute(2, 0, 3, 1, 4).unbind(0)


def normalize_qk(a: Array, norm: nn.Module | None, like: Array) -> Array:
    """Apply a norm, if there is one, to queries or keys, and return them in the dtype of the values `like`."""
    if norm is None:
        return a
    return norm(a).to(like.dtype)


def multi_head_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attend with queries, keys and values (b, attention, tokens, size); returns (b, tokens, attention * size).

    mask: (b, keys), True for the keys to attend to; None means all.
    """
    # Create this view inside the block, because forward mode does not support views as inputs of a compiled block.
    key_mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, key_mask).transpose(1, 2).flatten(2)


def swiglu_width(width: int) -> int:
    """Return the hidden width of a SwiGLU MLP: 8/3 width, rounded to a multiple of 8 for tensor cores.

    Its three matrices have as many parameters as the two of an MLP with hidden width 4 width.
    """
    return 8 * round(width / 3)
