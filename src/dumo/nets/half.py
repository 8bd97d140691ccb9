"""Linear layers that rest, in bf16: half the bytes of weights that nothing changes.

Under autocast in bf16 a linear layer casts its weights for every pass, so to keep them cast changes no bit of what it
gives. Norms, tables and what is trained stay in float32. Published weights are mostly stored in bf16: such are mapped
from their file, not copied, so processes of a machine share them until each has taken its part.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from dumo.nets.twin import put
from dumo.types import Array


class Half(nn.Linear):
    """A layer whose weights are bf16. Without autocast it computes in the precision of its input."""

    compute_dtype = torch.float32  # what peft makes adapters in

    def __init__(self, layer: nn.Linear) -> None:
        """Takes over the layer's numbers, rounded where they are not bf16."""
        biased = layer._parameters["bias"] is not None
        super().__init__(layer.in_features, layer.out_features, biased, device="meta")
        for name, p in layer.named_parameters():
            self._parameters[name] = nn.Parameter(p.detach().bfloat16(), False)

    def forward(self, input: Array) -> Array:
        """input (..., in_features)."""
        if torch.amp.is_autocast_available(kind := input.device.type) and torch.is_autocast_enabled(kind):
            return super().forward(input)
        bias = self._parameters["bias"]
        return F.linear(input, self.weight.to(input.dtype), None if bias is None else bias.to(input.dtype))


def halve(model: nn.Module, without: Sequence[str]) -> None:
    """Keep a model's linear layers in bf16, in place, and all else in float32, as what lies at or below `without`."""
    left = tuple(f"{path}." for path in without)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and not f"{name}.".startswith(left):
            put(model, name, Half(layer))
    for layer in model.modules():
        if not isinstance(layer, Half):
            _whole(layer)


def _whole(layer: nn.Module) -> None:
    """Set a layer's own numbers to float32."""
    for x in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if x.dtype in (torch.bfloat16, torch.float16):
            x.data = x.data.float()
