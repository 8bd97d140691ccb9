"""A DiT's block: attention over the tokens and a perceptron for each, modulated by a condition (Peebles & Xie 2023).

Modern blocks are those of LightningDiT (Yao et al. 2025): RMS norms (Zhang & Sennrich 2019), query and key norms
(Dehghani et al. 2023), SwiGLU with as many parameters (Shazeer 2020), and rotary positions.

`Stream` has the layers, `Block` calls them, `Preserving` is a block that keeps magnitudes (EDM2). `run_lean` calls a
block with activation checkpointing, where `make_lean` noted it.
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
from dumo.nets.embed import turn
from dumo.types import Array

EPS = 1e-6  # DiT's


class BlockSizes(NamedTuple):
    """The sizes and the kind of a block."""

    width: int
    attention: int  # heads
    modern: bool = False
    qk_norm: bool = False  # modern blocks have it anyway

    def qk_norm_layer(self) -> nn.RMSNorm | None:
        """A norm of queries or keys, with a weight for each number of an attention head."""
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
        """The perceptron is four times as wide as the block."""
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
        """Layers that start at zero."""
        return (self.modulation,)

    @property
    def fused(self) -> dict[str, int]:
        """Layers that hold several matrices, row blocks of one, and how many: Muon orthogonalizes each by itself."""
        return {"modulation": 6, "qkv": 3, "up": 2 if self.modern else 1}

    def modulations(self, e: Array) -> tuple[Modulation, Modulation]:
        """The modulation of attention and that of the perceptron, from the condition e (b, width)."""
        parts = self.modulation(e).unsqueeze(1).chunk(6, -1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def add_attention(self, h: Array, m: Modulation, *places: Array) -> Array:
        """h after attention."""
        return h + m.gate * self.attend(self.layer_input(h, m), *places)

    def add_perceptron(self, h: Array, m: Modulation) -> Array:
        """h after the perceptron."""
        return h + m.gate * self.perceive(self.layer_input(h, m))

    def layer_input(self, h: Array, m: Modulation) -> Array:
        """The input of a layer: h normalized and modulated."""
        return modulated(h, m.shift, m.scale, rms=self.modern)

    def attend(self, a: Array, *places: Array) -> Array:
        """Self-attention over the tokens."""
        return self.out(attention_of(*self.project(a, *places)))

    def project(self, a: Array, *places: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each (b, attention, tokens, size)."""
        q, k, v = split_heads(self.qkv(a), 3, self.attention)
        q = normalize_qk(q, self.q_norm, v)
        k = normalize_qk(k, self.k_norm, v)
        if places:  # rotary
            q = turn(q, *places)
            k = turn(k, *places)
        return q, k, v

    def perceive(self, a: Array) -> Array:
        """The perceptron, token by token."""
        if not self.modern:
            return self.down(F.gelu(self.up(a), approximate="tanh"))
        gate, up = self.up(a).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(Stream):
    """A block whose tokens attend to each other alone."""

    def forward(self, h: Array, e: Array, *places: Array) -> Array:
        """h (b, tokens, width); e (b, width), already through its SiLU; places: the tables of `turns`, or nothing."""
        of_attention, of_perceptron = self.modulations(e)
        h = self.add_attention(h, of_attention, *places)
        return self.add_perceptron(h, of_perceptron)


def normalize(h: Array, *, rms: bool = False) -> Array:
    """Over the last axis, without weights: mean 0 and variance 1, or with `rms` mean square 1."""
    return F.rms_norm(h, h.shape[-1:], eps=EPS) if rms else F.layer_norm(h, h.shape[-1:], eps=EPS)


def modulated(h: Array, shift: Array, scale: Array, *, rms: bool = False) -> Array:
    """h (b, tokens, width), normalized, then scaled and shifted, each (b, 1, width)."""
    return normalize(h, rms=rms) * (1 + scale) + shift


def split_heads(a: Array, parts: int, attention: int) -> tuple[Array, ...]:
    """(b, tokens, parts * width) -> `parts` tensors (b, attention, tokens, size)."""
    size = a.shape[-1] // (parts * attention)
    return a.view(*a.shape[:2], parts, attention, size).permute(2, 0, 3, 1, 4).unbind(0)


def normalize_qk(a: Array, norm: nn.Module | None, like: Array) -> Array:
    """Queries or keys through their norm, if they have one, in the type of the values."""
    return a if norm is None else norm(a).to(like.dtype)


def attention_of(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attention, its heads side by side: (b, tokens, width). `mask` (b, keys) says which keys are there."""
    key_mask = None if mask is None else mask[:, None, None]  # here: jvp carries no view into a compiled block
    return F.scaled_dot_product_attention(q, k, v, key_mask).transpose(1, 2).flatten(2)


def swiglu_width(width: int) -> int:
    """Hidden numbers of a gated perceptron: 8/3 width, so that its three matrices have the size of the plain one's two.

    Rounded to a multiple of 8, for the matrix units of a GPU.
    """
    return 8 * round(width / 3)


def run(block: nn.Module, *inputs: Array | None, lean: bool) -> Array:
    """The block's output. `lean`: keep its inputs alone, and compute the rest again in the backward pass.

    That is activation checkpointing (Chen et al. 2016).
    """
    if not lean or not torch.is_grad_enabled():
        return block(*inputs)
    recorded = any(isinstance(x, Dual) and x.recorded for x in inputs)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=noop_context_fn if recorded else _recompute)


Lean = bool | Annotated[int, Field(ge=2)]  # true: all blocks are computed again; n: every n-th, from the first on


def make_lean(blocks: Iterable[nn.Module], every: Lean) -> None:
    """Note in each block whether it is computed again: copies of a net, and parts of it, keep the note."""
    for i, block in enumerate(blocks):
        block.lean = bool(every) and i % int(every) == 0  # pyright: ignore[reportArgumentType]


def run_lean(block: nn.Module, *inputs: Array | None) -> Array:
    """`run`, as the block's note has it (`make_lean`); a function for diffusers' enable_gradient_checkpointing."""
    return run(block, *inputs, lean=bool(getattr(block, "lean", True)))


def _recompute() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Tangents on a block are known by the time it is computed again, unless they were recorded."""
    return nullcontext(), primal_only()


Magnitude = Literal["free", "preserved"]
# Roots of E[f(x)^2], x ~ N(0, 1).
GELU = 0.652
SWIGLU = 0.596  # EDM2, Eq. 81


class Unit(nn.Linear):
    """A linear layer without bias, of whose rows only the directions count."""

    def __init__(self, into: int, out: int) -> None:
        """From `into` to `out` numbers."""
        super().__init__(into, out, bias=False)

    def forward(self, input: Array) -> Array:
        """input (..., into); returns (..., out)."""
        return F.linear(input, F.normalize(self.weight, dim=1))


class Preserving(Block):
    """A block that preserves magnitudes (EDM2, Karras et al. 2024): its layers' inputs and outputs have mean square 1.

    Weights that grow during training lower the effective learning rate, of each layer at its own pace. EDM2 removes
    that:

    - A linear layer has no bias and uses its rows at length 1 (Sec. 2.3): uncorrelated inputs of mean square 1 give
      outputs of mean square 1. The gradient is orthogonal to a row, so a step makes it longer; `shorten` after each
      step brings it back to 1. EDM2's rows have length sqrt(inputs); with 1 the learning rates of the other nets fit
      (ours).
    - An activation is divided by the root of its mean square over N(0, 1) (Sec. 2.4, Eq. 81).
    - A sum of h and a branch a is divided by the growth of its magnitude (Eq. 88): with a gate g for EDM2's fixed
      weights, (h + g a) / sqrt(1 + g^2). EDM2 has g = 3/7; here the condition sets it, and it starts at 0, as
      adaLN-zero's does (ours). So a block starts as the identity.
    - The norm follows the modulation, where adaLN has it before (ours): at any scale and shift a layer's input has mean
      square 1. Bill et al. 2025, who train transformers so, leave out both norm and shift.

    Attention still averages values, as in EDM2. Embeddings, modulations and heads are unchanged.
    """

    def __init__(self, sizes: BlockSizes) -> None:
        """`Block` with units for its linear layers, except those that start at zero."""
        super().__init__(sizes)
        for name, layer in [*self.named_children()]:
            if isinstance(layer, nn.Linear) and layer not in self.zero_layers:
                setattr(self, name, Unit(layer.in_features, layer.out_features))

    def add_attention(self, h: Array, m: Modulation, *places: Array) -> Array:
        """h after attention."""
        return blend(h, self.attend(self.layer_input(h, m), *places), m.gate)

    def add_perceptron(self, h: Array, m: Modulation) -> Array:
        """h after the perceptron."""
        return blend(h, self.perceive(self.layer_input(h, m)), m.gate)

    def layer_input(self, h: Array, m: Modulation) -> Array:
        """The input of a layer: h modulated, then normalized."""
        return normalize(h * (1 + m.scale) + m.shift, rms=self.modern)

    def perceive(self, a: Array) -> Array:
        """The perceptron, token by token."""
        return super().perceive(a) / (SWIGLU if self.modern else GELU)


def blend(h: Array, a: Array, gate: Array) -> Array:
    """h + gate a over sqrt(1 + gate^2), its magnitude where h and a have mean square 1 and are uncorrelated."""
    return (h + gate * a) / (1 + gate * gate) ** 0.5


@torch.no_grad()
def shorten(net: nn.Module) -> None:
    """Scale the rows of all units to length 1, in place."""
    for layer in net.modules():
        if isinstance(layer, Unit):
            layer.weight.copy_(F.normalize(layer.weight, dim=1))
