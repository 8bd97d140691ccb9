"""Magnitude preservation (EDM2, Karras et al. 2024): what enters and leaves a layer of the trunk has mean square 1.

Weights that only ever grow lower the rate at which a net learns, each layer's at its own pace. EDM2 takes that out:

- A linear layer has no bias, and uses its rows at length 1 (Sec. 2.3): inputs of mean square 1, that are as good as
  uncorrelated, come out so. The gradient is orthogonal to a row, so a step makes it longer; `shorten` after each step
  brings it back to 1. EDM2's rows have length sqrt(inputs); with 1 the learning rates of the other nets serve (ours).
- A bend is divided by the root of its mean square over N(0, 1) (Sec. 2.4, Eq. 81).
- A sum of h and a branch a is divided by what it adds to the magnitude (Eq. 88): with a gate g in the place of EDM2's
  fixed weights, (h + g a) / sqrt(1 + g^2). EDM2 has g = 3/7; here the condition sets it, from 0 on, as adaLN-zero does
  (ours). So a block starts as the identity.
- A norm stands behind the modulation, not before it (ours): what a layer takes in has mean square 1 at any scale and
  shift. Bill et al. 2025, who train transformers so, leave both norm and shift out.

Attention still averages values, as in EDM2. The embeddings, the modulations and the heads are as ever.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from dumo.nets.block import Block, Mlp, Modulation, Sizes
from dumo.nets.norm import normalize
from dumo.types import Array

Magnitude = Literal["free", "preserved"]
ROOT: dict[Mlp, float] = {"gelu": 0.652, "swiglu": 0.596}  # of E[f(x)^2], x ~ N(0, 1); swiglu: EDM2, Eq. 81


class Unit(nn.Linear):
    """A linear layer without bias, whose rows count by their directions alone."""

    def __init__(self, into: int, out: int) -> None:
        """From `into` to `out` numbers."""
        super().__init__(into, out, bias=False)

    def forward(self, input: Array) -> Array:
        """input (..., into); returns (..., out)."""
        return F.linear(input, F.normalize(self.weight, dim=1))


class Preserving(Block):
    """A block that keeps the mean square of its tokens."""

    def __init__(self, sizes: Sizes) -> None:
        """As `Block`."""
        super().__init__(sizes)
        for name, layer in [*self.named_children()]:
            if isinstance(layer, nn.Linear) and layer not in self.silent:
                setattr(self, name, Unit(layer.in_features, layer.out_features))

    def look(self, h: Array, m: Modulation, *places: Array) -> Array:
        """h after attention."""
        return blend(h, self.attend(self.shown(h, m), *places), m.gate)

    def think(self, h: Array, m: Modulation) -> Array:
        """h after the perceptron."""
        return blend(h, self.perceive(self.shown(h, m)), m.gate)

    def shown(self, h: Array, m: Modulation) -> Array:
        """h as a layer gets it: modulated, then normalized."""
        return normalize(h * (1 + m.scale) + m.shift, self.norm)

    def perceive(self, a: Array) -> Array:
        """The perceptron, token by token."""
        return super().perceive(a) / ROOT[self.mlp]


def blend(h: Array, a: Array, gate: Array) -> Array:
    """h + gate a, over what that does to the magnitude where h and a are uncorrelated and of the same one."""
    return (h + gate * a) / (1 + gate * gate) ** 0.5


@torch.no_grad()
def shorten(net: nn.Module) -> None:
    """Make the rows of all units as long as they are used, in place."""
    for layer in (layer for layer in net.modules() if isinstance(layer, Unit)):
        layer.weight.copy_(F.normalize(layer.weight, dim=1))
