"""A magnitude-preserving DiT block (EDM2, Karras et al. 2024): inputs and outputs of layers have mean square 1.

Growing weights decrease the effective learning rate, differently in each layer. EDM2 avoids this:

- A linear layer (`UnitRowLinear`) has no bias and normalizes its rows (Sec. 2.3): uncorrelated inputs of mean square 1
  give outputs of mean square 1. The gradient is orthogonal to a row, so each step increases its length, and
  `normalize_rows` resets it to 1. EDM2's rows have length sqrt(inputs); with 1, the learning rates of the other
  networks apply (our choice).
- An activation is divided by its RMS over N(0, 1) (Sec. 2.4, Eq. 81).
- A sum of h and a branch a is normalized (`blend`, Eq. 88): with a gate g, (h + g a) / sqrt(1 + g^2). EDM2 has
  g = 3/7; here g depends on the condition and is initialized to 0, as in adaLN-zero (our choice), so a block is
  initially the identity.
- The norm follows the modulation instead of preceding it as in adaLN (our choice), so a layer's input has mean square 1
  for any scale and shift. Bill et al. 2025 train such transformers without norm and shift.

Attention still averages values, as in EDM2. Embeddings, modulations and heads are unchanged.

`dumo.nets.dit` uses a `MagnitudePreservingBlock` for each layer, and calls `normalize_rows` after each training step.
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
    """A linear layer without bias that normalizes each row of its weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Create a layer from `in_features` to `out_features` channels."""
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Array) -> Array:
        """Map input (..., in_features) to (..., out_features)."""
        return F.linear(input, F.normalize(self.weight, dim=1))


class MagnitudePreservingBlock(Block):
    """A `Block` with normalized rows, scaled activations and blended sums."""

    def __init__(self, sizes: BlockSizes) -> None:
        """Create a `Block` and replace its linear layers by `UnitRowLinear`, except those initialized to zero."""
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
    """Return (h + gate a) / sqrt(1 + gate^2), with mean square 1 for uncorrelated h and a of mean square 1."""
    return (h + gate * a) / (1 + gate * gate) ** 0.5


@torch.no_grad()
def normalize_rows(net: nn.Module) -> None:
    """Normalize the rows of all `UnitRowLinear` layers of a network to length 1, in place."""
    for layer in net.modules():
        if isinstance(layer, UnitRowLinear):
            layer.weight.copy_(F.normalize(layer.weight, dim=1))
