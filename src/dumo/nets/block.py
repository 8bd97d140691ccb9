"""A DiT's block: attention among tokens and a perceptron for each, modulated by the condition (Peebles & Xie 2023).

The parts are functions of their own: blocks that read a text (`dumo.nets.reading`) put others between them.
"""

from typing import Literal, NamedTuple

from torch import nn
from torch.nn import functional as F

from dumo.nets.norm import EPS, Norm, modulated
from dumo.nets.rotary import turn
from dumo.types import Array

Mlp = Literal["gelu", "swiglu"]


class Sizes(NamedTuple):
    """What a block is made of."""

    width: int
    attention: int  # heads
    norm: Norm = "layer"
    qk_norm: bool = False
    mlp: Mlp = "gelu"

    def gains(self) -> nn.RMSNorm | None:
        """A norm of queries or keys, with a weight for each number of a head; None without `qk_norm`."""
        return nn.RMSNorm(self.width // self.attention, eps=EPS) if self.qk_norm else None


class Modulation(NamedTuple):
    """What a condition does to a layer: each (b, 1, width)."""

    shift: Array
    scale: Array
    gate: Array


class Stream(nn.Module):
    """What becomes of one stream of tokens: attention and a perceptron, each modulated and gated by the condition.

    The gates start at zero (adaLN-zero).
    """

    def __init__(self, sizes: Sizes) -> None:
        """The perceptron is four times as wide as the block."""
        super().__init__()
        width = sizes.width
        self.mlp: Mlp = sizes.mlp
        self.attention = sizes.attention
        self.norm: Norm = sizes.norm
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = 4 * width if self.mlp == "gelu" else gated(width)
        self.up, self.down = nn.Linear(width, hidden if self.mlp == "gelu" else 2 * hidden), nn.Linear(hidden, width)
        self.q_norm, self.k_norm = sizes.gains(), sizes.gains()

    @property
    def silent(self) -> tuple[nn.Linear, ...]:
        """Layers that start at zero."""
        return (self.modulation,)

    @property
    def fused(self) -> dict[str, int]:
        """Layers that are several in one, rows below rows, and how many: an optimizer of matrices takes them apart."""
        return {"modulation": 6, "qkv": 3, "up": 1 if self.mlp == "gelu" else 2}

    def modulations(self, e: Array) -> tuple[Modulation, Modulation]:
        """What the condition e (b, width) does to attention, and to the perceptron."""
        parts = self.modulation(e).unsqueeze(1).chunk(6, -1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def look(self, h: Array, m: Modulation, *places: Array) -> Array:
        """h after attention."""
        return h + m.gate * self.attend(self.shown(h, m), *places)

    def think(self, h: Array, m: Modulation) -> Array:
        """h after the perceptron."""
        return h + m.gate * self.perceive(self.shown(h, m))

    def shown(self, h: Array, m: Modulation) -> Array:
        """h as a layer gets it: normalized and modulated."""
        return modulated(h, self.norm, m.shift, m.scale)

    def attend(self, a: Array, *places: Array) -> Array:
        """Self-attention over the tokens."""
        return self.out(mix(*self.project(a, *places)))

    def project(self, a: Array, *places: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each (b, attention, tokens, size)."""
        q, k, v = parted(self.qkv(a), 3, self.attention)
        q, k = unit(q, self.q_norm, v), unit(k, self.k_norm, v)
        return (turn(q, *places), turn(k, *places), v) if places else (q, k, v)

    def perceive(self, a: Array) -> Array:
        """The perceptron, token by token."""
        if self.mlp == "gelu":
            return self.down(F.gelu(self.up(a), approximate="tanh"))
        gate, up = self.up(a).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(Stream):
    """A stream whose tokens look at each other alone."""

    def forward(self, h: Array, e: Array, *places: Array) -> Array:
        """h (b, tokens, width), e (b, width), already through its SiLU; places: what `turns` gives, or nothing."""
        first, second = self.modulations(e)
        return self.think(self.look(h, first, *places), second)


def parted(a: Array, parts: int, attention: int) -> tuple[Array, ...]:
    """(b, tokens, parts * width) -> so many parts by heads, each (b, attention, tokens, size)."""
    size = a.shape[-1] // (parts * attention)
    return a.view(*a.shape[:2], parts, attention, size).permute(2, 0, 3, 1, 4).unbind(0)


def unit(a: Array, norm: nn.Module | None, like: Array) -> Array:
    """Queries or keys through their norm, if they have one, in the type of the values."""
    return a if norm is None else norm(a).to(like.dtype)


def mix(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Attention, its heads side by side: (b, tokens, width). `mask` (b, keys) says which keys are there."""
    seen = None if mask is None else mask[:, None, None]  # here: torch.func.jvp carries no view into a compiled block
    return F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)


def gated(width: int) -> int:
    """Hidden numbers of a gated perceptron, whose three matrices have the size of the plain one's two: 8/3 width.

    Rounded to a multiple of 8, which matrix units like.
    """
    return 8 * round(width / 3)
