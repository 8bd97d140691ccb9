"""Magnitude preservation (EDM2, Karras et al. 2024): inputs and outputs of a block's layers have mean square 1.

Weights that grow during training lower the effective learning rate, of each layer at its own pace. EDM2 removes that:

- A linear layer has no bias and uses its rows at length 1 (Sec. 2.3): uncorrelated inputs of mean square 1 give outputs
  of mean square 1. The gradient is orthogonal to a row, so a step makes it longer; `shorten` after each step brings it
  back to 1. EDM2's rows have length sqrt(inputs); with 1 the learning rates of the other nets fit (ours).
- An activation is divided by the root of its mean square over N(0, 1) (Sec. 2.4, Eq. 81).
- A sum of h and a branch a is divided by the growth of its magnitude (Eq. 88): with a gate g for EDM2's fixed weights,
  (h + g a) / sqrt(1 + g^2). EDM2 has g = 3/7; here the condition sets it, and it starts at 0, as adaLN-zero's does
  (ours). So a block starts as the identity.
- The norm follows the modulation, where adaLN has it before (ours): at any scale and shift a layer's input has mean
  square 1. Bill et al. 2025, who train transformers so, leave out both norm and shift.

Attention still averages values, as in EDM2. Embeddings, modulations and heads are unchanged.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from dumo.nets.block import Block, Modulation, Sizes, normalize
from dumo.types import Array

Magnitude = Literal["free", "preserved"]
GELU, SWIGLU = 0.652, 0.596  # roots of E[f(x)^2], x ~ N(0, 1); SwiGLU: EDM2, Eq. 81


class Unit(nn.Linear):
    """A linear layer without bias, of whose rows only the directions count."""

    def __init__(self, into: int, out: int) -> None:
        """From `into` to `out` numbers."""
        super().__init__(into, out, bias=False)

    def forward(self, input: Array) -> Array:
        """input (..., into); returns (..., out)."""
        return F.linear(input, F.normalize(self.weight, dim=1))


class Preserving(Block):
    """A block that keeps the mean square of its tokens."""

    def __init__(self, sizes: Sizes) -> None:
        """`Block` with units for its linear layers, except those that start at zero."""
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
    for layer in (layer for layer in net.modules() if isinstance(layer, Unit)):
        layer.weight.copy_(F.normalize(layer.weight, dim=1))
