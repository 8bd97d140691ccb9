"""Low-pass a pretrained time embedder, so that the model can be fine-tuned with du/dt in its target (ours).

The time embedders of image models have waves cos(w_i t), sin(w_i t) with frequencies w_i from 1000 to 0.1 rad, and two
linear layers. du/dt is therefore large and rough, and training a flow map diverges (docs/reproduce.md). But the learned
embedding t -> temb hardly depends on the high frequencies. Therefore

    cut      masks the columns of the first layer for high frequencies (`MaskedLinear`);
    refit    trains both layers to reproduce the old embedding on [0, 1]. Biases that are frozen for a LoRA stay
             frozen, without loss of accuracy.

`dumo.nets.dualized` calls `cut` when a network is built and `refit` when its weights are loaded. The refit needs no
images and takes seconds. The model keeps its class and shapes; its saved weights have zeros in the masked columns.
"""

import copy
from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor, nn

from dumo.nets.heads import bias_or_none
from dumo.types import Array

# The ratio of the highest to the lowest frequency in every model of `dumo.nets.family`.
PERIOD = 10_000.0
# The refit (our choice): the number of training times, the steps of Adam, and its initial learning rate, with a cosine
# decay to 0.
_POINTS = 256
STEPS = 1000
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class LowpassFit:
    """The effect of a low-pass on a time embedder, for reports.

    limit: the highest frequency that is kept, in rad per unit of t.
    kept, waves: the numbers of kept waves and of all waves.
    error: the RMS of the difference of the embeddings, divided by the standard deviation of the old one; None before
        the refit.
    """

    limit: float
    kept: int
    waves: int
    error: float | None

    def __str__(self) -> str:
        """Describe the result in one line."""
        text = f"low-pass at {self.limit:g} rad: {self.kept} of {self.waves} waves of time are kept"
        if self.error is not None:
            text += f"; the time embedding changes by {100 * self.error:.2g} % of its standard deviation"
        return text


class MaskedLinear(nn.Linear):
    """The first layer of a time embedder with a mask `keep` (waves,), False for the waves to ignore."""

    keep: Tensor

    def __init__(self, layer: nn.Linear, keep: Tensor) -> None:
        """Share the layer's parameters."""
        super().__init__(layer.in_features, layer.out_features, bias_or_none(layer) is not None, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, input: Array) -> Array:
        """Map the waves (..., waves) to (..., out_features)."""
        return super().forward(input * self.keep)

    def plain(self) -> nn.Linear:
        """Return an equivalent linear layer, with zeros in the masked columns of its weight."""
        layer = nn.Linear(self.in_features, self.out_features, bias_or_none(self) is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.detach() * self.keep)
        layer.bias = self.bias
        return layer


def frequencies(num_waves: int, max_frequency: float) -> Tensor:
    """Return the frequencies of the waves, (num_waves,), in rad per unit of t, in float64: of cosines, then of sines.

    Each half decreases from `max_frequency`.
    """
    half = num_waves // 2
    decay = torch.exp(-log(PERIOD) * torch.arange(half, dtype=torch.float64, device="cpu") / half)
    return (max_frequency * decay).repeat(2)


def waves(t: Array, w: Tensor) -> Array:
    """Return the waves (n, waves) at times t (n,): cos(w t) in the first half of the frequencies w, then sin(w t)."""
    angles = t[:, None] * w
    half = len(w) // 2
    return torch.cat([angles[:, :half].cos(), angles[:, half:].sin()], 1)


def linear_layers(embedder: nn.Module) -> tuple[str, nn.Linear, nn.Linear]:
    """Return the name of an embedder's first linear layer, and its two linear layers."""
    linear = [(name, layer) for name, layer in embedder.named_modules() if isinstance(layer, nn.Linear)]
    (first_name, first_layer), (_, second_layer) = linear
    return first_name, first_layer, second_layer


def cut(embedder: nn.Module, max_frequency: float, limit: float) -> LowpassFit:
    """Mask the waves of an embedder above `limit`, in place. `max_frequency` is its highest, both in rad."""
    name, first_layer, _ = linear_layers(embedder)
    w = frequencies(first_layer.in_features, max_frequency)
    keep = w <= limit
    embedder.set_submodule(name, MaskedLinear(first_layer, keep.to(first_layer.weight.device)))
    return LowpassFit(limit=limit, kept=int(keep.sum()), waves=len(w), error=None)


def refit(embedder: nn.Module, max_frequency: float, fit: LowpassFit) -> LowpassFit:
    """Train an embedder after `cut`, in place, to reproduce its embedding before, and return `fit` with the error.

    Parameters that do not require gradients are not changed.
    """
    if fit.kept == fit.waves:
        return fit
    old = copy.deepcopy(embedder)
    name, masked, _ = linear_layers(embedder)
    _, masked_copy, _ = linear_layers(old)
    assert isinstance(masked, MaskedLinear)

    # Remove the mask from the copy, which gives the old embedding.
    unmasked = nn.Linear(masked.in_features, masked.out_features, bias_or_none(masked) is not None, device="meta")
    unmasked.weight = masked_copy.weight
    unmasked.bias = masked_copy.bias
    old.set_submodule(name, unmasked)

    with torch.no_grad():
        masked.weight.mul_(masked.keep)
    error = _regress(embedder, old, frequencies(masked.in_features, max_frequency))
    return replace(fit, error=error)


def _regress(new: nn.Module, old: nn.Module, w: Tensor) -> float:
    """Train the embedder `new`, in place, to reproduce `old`, with waves of frequencies w (waves,).

    Returns the `error` of a `LowpassFit`, at times between the training times. It runs on a GPU if there is one; the
    weights of `new` are then moved back to their device.
    """
    weights_device = next(new.parameters()).device
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    t = (torch.arange(2 * _POINTS, dtype=torch.float64) + 0.5) / (2 * _POINTS)
    inputs = waves(t, w).float().to(device)
    training_inputs = inputs[::2]
    test_inputs = inputs[1::2]
    new = new.to(device)
    old = old.to(device).requires_grad_(False)
    trained = [p for p in new.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    curve = old(training_inputs)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (new(training_inputs) - curve).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        target = old(test_inputs)
        error = (new(test_inputs) - target).norm() / (target - target.mean(0)).norm()
    new.zero_grad(set_to_none=True)
    new.to(weights_device)
    return float(error)
