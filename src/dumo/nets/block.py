"""A DiT's block: attention over the tokens and a perceptron for each, modulated by a condition (Peebles & Xie 2023).

Modern blocks are those of LightningDiT (Yao et al. 2025): RMS norms (Zhang & Sennrich 2019), query and key norms
(Dehghani et al. 2023), SwiGLU with as many parameters (Shazeer 2020), and rotary positions.

- `Stream` has the layers, `Block` calls them in order: h + gate * attention, then h + gate * perceptron. The condition
  gives each of the two a shift, a scale and a gate. `dumo.nets.textblock` has the block that reads a text.
- `Preserving` is a block that keeps magnitudes (EDM2). After each training step `normalize_rows` restores its weights.
- For activation checkpointing `mark_recomputed` marks blocks once, and `run_as_marked` calls one in each pass.

In all shapes b is the batch, tokens the number of tokens and size the width of one attention head.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

from dumo.autodiff.dual import Dual, primal_only
from dumo.nets.embed import apply_rotary
from dumo.types import Array

EPS = 1e-6  # of all norms (DiT)


class BlockSizes(NamedTuple):
    """The sizes and options of a block, as `DiT` has them."""

    width: int
    attention: int  # the number of attention heads
    modern: bool = False
    qk_norm: bool = False  # modern blocks have these norms anyway

    def qk_norm_layer(self) -> nn.RMSNorm | None:
        """Make a norm of queries or keys, with a weight for each number of an attention head; None: there is none."""
        if not (self.modern or self.qk_norm):
            return None
        return nn.RMSNorm(self.width // self.attention, eps=EPS)


class Modulation(NamedTuple):
    """The shift, scale and gate that a condition gives a layer, each (b, 1, width)."""

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
        """The number of matrices, one above the other, in the weight of a layer. Muon orthogonalizes each by itself."""
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
        a = self.perceive(self.layer_input(h, m))
        return h + m.gate * a

    def layer_input(self, h: Array, m: Modulation) -> Array:
        """Normalize and modulate h (b, tokens, width): the input of attention or of the perceptron."""
        return modulated(h, m.shift, m.scale, rms=self.modern)

    def attend(self, a: Array, *rotary: Array) -> Array:
        """Apply self-attention over the tokens of a (b, tokens, width); returns this shape."""
        q, k, v = self.project(a, *rotary)
        return self.out(multi_head_attention(q, k, v))

    def project(self, a: Array, *rotary: Array) -> tuple[Array, Array, Array]:
        """Return queries, keys and values, each (b, attention, tokens, size), of a (b, tokens, width).

        `rotary` are the tables of `rotary_tables`, or nothing.
        """
        q, k, v = split_heads(self.qkv(a), 3, self.attention)
        q = normalize_qk(q, self.q_norm, v)
        k = normalize_qk(k, self.k_norm, v)
        if rotary:
            q = apply_rotary(q, *rotary)
            k = apply_rotary(k, *rotary)
        return q, k, v

    def perceive(self, a: Array) -> Array:
        """Apply the perceptron to each token of a (b, tokens, width); returns this shape."""
        if not self.modern:
            return self.down(F.gelu(self.up(a), approximate="tanh"))
        gate, up = self.up(a).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(Stream):
    """A block whose tokens attend to each other alone."""

    def forward(self, h: Array, condition: Array, *rotary: Array) -> Array:
        """Return h (b, tokens, width) after attention and the perceptron.

        The condition (b, width) has had its SiLU. `rotary` are the tables of `rotary_tables`, or nothing.
        """
        attention_modulation, perceptron_modulation = self.modulations(condition)
        h = self.add_attention(h, attention_modulation, *rotary)
        return self.add_perceptron(h, perceptron_modulation)


def normalize(h: Array, *, rms: bool = False) -> Array:
    """Normalize the last axis, without weights: to mean 0 and variance 1, or with `rms` to mean square 1."""
    if rms:
        return F.rms_norm(h, h.shape[-1:], eps=EPS)
    return F.layer_norm(h, h.shape[-1:], eps=EPS)


def modulated(h: Array, shift: Array, scale: Array, *, rms: bool = False) -> Array:
    """Normalize h (b, tokens, width), then scale and shift it, by (b, 1, width) each."""
    return normalize(h, rms=rms) * (1 + scale) + shift


def split_heads(a: Array, parts: int, attention: int) -> tuple[Array, ...]:
    """Split a (b, tokens, parts * width) into `parts` tensors (b, attention, tokens, size)."""
    size = a.shape[-1] // (parts * attention)
    return a.view(*a.shape[:2], parts, attention, size).permute(2, 0, 3, 1, 4).unbind(0)


def normalize_qk(a: Array, norm: nn.Module | None, like: Array) -> Array:
    """Apply a norm, if there is one, to queries or keys; returns them in the type of `like`, the values."""
    return a if norm is None else norm(a).to(like.dtype)


def multi_head_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attend with queries, keys and values (b, attention, tokens, size); returns (b, tokens, attention * size).

    `mask` (b, keys) is True for the keys that are read; None: all are.
    """
    # The view of the mask is made here, because jvp carries no view into a compiled block.
    key_mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, key_mask).transpose(1, 2).flatten(2)


def swiglu_width(width: int) -> int:
    """Return the hidden width of a gated perceptron: 8/3 width, rounded to a multiple of 8 for the GPU's matrix units.

    Its three matrices then have as many numbers as the two of a plain perceptron that is 4 width wide.
    """
    return 8 * round(width / 3)


# Activation checkpointing (Chen et al. 2016): a block's inputs are kept, and the rest is computed again in the backward
# pass. True: of all blocks; n: of every n-th, from the first on.
Checkpointing = bool | Annotated[int, Field(ge=2)]


def mark_recomputed(blocks: Iterable[nn.Module], every: Checkpointing) -> None:
    """Set `recomputed` in each block: whether it is checkpointed. Copies of a net, and parts of it, keep the mark."""
    for i, block in enumerate(blocks):
        block.recomputed = bool(every) and i % int(every) == 0  # pyright: ignore[reportArgumentType]


def run_as_marked(block: nn.Module, *inputs: Array | None) -> Array:
    """Return the block's output, with checkpointing if the block is marked so, or has no mark, and gradients are on.

    diffusers' `enable_gradient_checkpointing` takes this function.
    """
    recomputed = bool(getattr(block, "recomputed", True))
    if not recomputed or not torch.is_grad_enabled():
        return block(*inputs)
    is_recorded = any(isinstance(x, Dual) and x.recorded for x in inputs)
    contexts = noop_context_fn if is_recorded else _without_tangents
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _without_tangents() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a block's first pass and of its second, which computes no tangents.

    No one asks for them again, unless they were recorded for gradients.
    """
    return nullcontext(), primal_only()


Magnitude = Literal["free", "preserved"]
# The root of E[f(x)^2] of an activation f, x ~ N(0, 1).
GELU_RMS = 0.652
SWIGLU_RMS = 0.596  # EDM2, Eq. 81


class UnitRowLinear(nn.Linear):
    """A linear layer without bias that divides each row of its weight by the row's length."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Map `in_features` numbers to `out_features`."""
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Array) -> Array:
        """Take input (..., in_features), and return (..., out_features)."""
        return F.linear(input, F.normalize(self.weight, dim=1))


class Preserving(Block):
    """A block that preserves magnitudes (EDM2, Karras et al. 2024): its layers' inputs and outputs have mean square 1.

    Weights that grow during training lower the effective learning rate, of each layer at its own pace. EDM2 removes
    that:

    - A linear layer has no bias and uses its rows at length 1 (Sec. 2.3): uncorrelated inputs of mean square 1 give
      outputs of mean square 1. The gradient is orthogonal to a row, so a step makes it longer; after each step
      `normalize_rows` brings it back to 1. EDM2's rows have length sqrt(inputs); with 1 the learning rates of the other
      nets fit (ours).
    - An activation is divided by the root of its mean square over N(0, 1) (Sec. 2.4, Eq. 81).
    - A sum of h and a branch a is divided by the growth of its magnitude (Eq. 88): with a gate g for EDM2's fixed
      weights, (h + g a) / sqrt(1 + g^2). EDM2 has g = 3/7; here the condition sets it, and it starts at 0, as
      adaLN-zero's does (ours). So a block starts as the identity.
    - The norm follows the modulation, where adaLN has it before (ours): at any scale and shift a layer's input has mean
      square 1. Bill et al. 2025, who train transformers so, leave out both norm and shift.

    Attention still averages values, as in EDM2. Embeddings, modulations and heads are unchanged.
    """

    def __init__(self, sizes: BlockSizes) -> None:
        """Make a `Block` and replace its linear layers by `UnitRowLinear`, except those that start at zero."""
        super().__init__(sizes)
        for name, layer in [*self.named_children()]:
            if isinstance(layer, nn.Linear) and layer not in self.zero_layers:
                setattr(self, name, UnitRowLinear(layer.in_features, layer.out_features))

    def add_attention(self, h: Array, m: Modulation, *rotary: Array) -> Array:
        """Blend h (b, tokens, width) with attention."""
        a = self.attend(self.layer_input(h, m), *rotary)
        return blend(h, a, m.gate)

    def add_perceptron(self, h: Array, m: Modulation) -> Array:
        """Blend h (b, tokens, width) with the perceptron."""
        a = self.perceive(self.layer_input(h, m))
        return blend(h, a, m.gate)

    def layer_input(self, h: Array, m: Modulation) -> Array:
        """Modulate h (b, tokens, width), then normalize it: the input of attention or of the perceptron."""
        return normalize(h * (1 + m.scale) + m.shift, rms=self.modern)

    def perceive(self, a: Array) -> Array:
        """Apply the perceptron to each token of a (b, tokens, width); returns this shape."""
        return super().perceive(a) / (SWIGLU_RMS if self.modern else GELU_RMS)


def blend(h: Array, a: Array, gate: Array) -> Array:
    """Return (h + gate a) / sqrt(1 + gate^2): of mean square 1 where h and a are, and are uncorrelated."""
    return (h + gate * a) / (1 + gate * gate) ** 0.5


@torch.no_grad()
def normalize_rows(net: nn.Module) -> None:
    """Scale the rows of all `UnitRowLinear` layers of a net to length 1, in place."""
    for layer in net.modules():
        if isinstance(layer, UnitRowLinear):
            layer.weight.copy_(F.normalize(layer.weight, dim=1))
