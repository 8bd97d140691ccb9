"""A DiT's block that preserves magnitudes (EDM2, Karras et al. 2024): inputs and outputs have mean square 1.

Weights that grow during training lower the effective learning rate, of each layer at its own pace. EDM2 removes that:

- A linear layer (`UnitRowLinear`) has no bias and uses its rows at length 1 (Sec. 2.3): uncorrelated inputs of mean
  square 1 give outputs of mean square 1. The gradient is orthogonal to a row, so a step makes it longer; after each
  step `normalize_rows` brings it back to 1. EDM2's rows have length sqrt(inputs); with 1 the learning rates of the
  other nets fit (ours).
- An activation is divided by the root of its mean square over N(0, 1) (Sec. 2.4, Eq. 81).
- A sum of h and a branch a is divided by the growth of its magnitude (`blend`, Eq. 88): with a gate g for EDM2's fixed
  weights, (h + g a) / sqrt(1 + g^2). EDM2 has g = 3/7; here the condition sets it, and it starts at 0, as adaLN-zero's
  does (ours). So a block starts as the identity.
- The norm follows the modulation, where adaLN has it before (ours): at any scale and shift a layer's input has mean
  square 1. Bill et al. 2025, who train transformers so, leave out both norm and shift.

Attention still averages values, as in EDM2. Embeddings, modulations and heads are unchanged.

`dumo.nets.dit` makes a `MagnitudePreservingBlock` for each layer, and calls `normalize_rows` after each training step.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from dumo.nets.block import Block, BlockSizes, Modulation, normalize
from dumo.types import Array

Magnitude = Literal["free", "preserved"]
# The root of E[f(x)^2] for an activation f and x ~ N(0, 1).
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


class MagnitudePreservingBlock(Block):
    """A `Block` of unit rows, scaled activations and blended sums: inputs and outputs of layers have mean square 1."""

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
        a = self.apply_perceptron(self.layer_input(h, m))
        return blend(h, a, m.gate)

    def layer_input(self, h: Array, m: Modulation) -> Array:
        """Modulate h (b, tokens, width), then normalize it: the input of attention or of the perceptron."""
        return normalize(h * (1 + m.scale) + m.shift, rms=self.modern)

    def apply_perceptron(self, a: Array) -> Array:
        """Apply the perceptron to each token of a (b, tokens, width); returns this shape."""
        return super().apply_perceptron(a) / (SWIGLU_RMS if self.modern else GELU_RMS)


def blend(h: Array, a: Array, gate: Array) -> Array:
    """Return (h + gate a) / sqrt(1 + gate^2): of mean square 1 where h and a are, and are uncorrelated."""
    return (h + gate * a) / (1 + gate * gate) ** 0.5


@torch.no_grad()
def normalize_rows(net: nn.Module) -> None:
    """Scale the rows of all `UnitRowLinear` layers of a net to length 1, in place."""
    for layer in net.modules():
        if isinstance(layer, UnitRowLinear):
            layer.weight.copy_(F.normalize(layer.weight, dim=1))
