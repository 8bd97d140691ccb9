"""A low-pass of a time embedder, so that a net which reads 1000 t can be tuned on its derivative (ours).

Image models begin with waves cos(w_i t), sin(w_i t) of frequencies w_i from 1000 down to 0.1 rad, and two linear layers
over them. So du/dt is large and rough: a flow map that is regressed on it diverges (docs/reproduce.md). But the curve
t -> temb that the embedder has learned hardly needs its quick waves. So

    cut      quick waves no longer enter: the first layer masks its columns for them (`MaskedLinear`);
    refit    both layers are trained until their curve over [0, 1] is the old one, as closely as slow waves allow.
             Biases that are fixed for a LoRA stay fixed, which loses nothing.

`dumo.nets.dualized` calls `cut` when a net is made and `refit` when the weights are loaded. The refit regresses the new
curve on the old one: it needs no image, and takes seconds. The model keeps its class and shapes; its saved weights have
zeros for the cut columns. `frequencies`, `waves` and `linear_layers` serve `dumo.nets.gap`, too.
"""

import copy
from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor, nn

from dumo.nets.heads import bias_or_none
from dumo.types import Array

PERIOD = 10_000.0  # the frequency of the quickest wave over that of the slowest, in every model of `dumo.nets.family`
# The refit, all ours:
_POINTS = 256  # times at which the curves are compared in training
STEPS = 1000  # of Adam
_LEARNING_RATE = 2e-3  # Adam's at the start; it falls to 0 by half a cosine


@dataclass(frozen=True)
class LowpassFit:
    """What a low-pass has done to a time embedder, for reports."""

    limit: float  # rad per unit of t: the frequency up to which waves enter
    kept: int  # the number of waves that enter
    waves: int  # the number of all waves
    # Root mean square of the new curve minus the old, over that of the old about its mean; None: not yet refit.
    error: float | None

    def __str__(self) -> str:
        """Describe it in one line."""
        text = f"low-pass at {self.limit:g} rad: {self.kept} of {self.waves} waves of time stay"
        if self.error is not None:
            text += f"; the curve of time is off by {100 * self.error:.2g} % of its spread"
        return text


class MaskedLinear(nn.Linear):
    """The first layer of a time embedder, with its quick waves masked: no update of their columns has an effect."""

    keep: Tensor  # (waves,), bool: True for the waves that enter

    def __init__(self, layer: nn.Linear, keep: Tensor) -> None:
        """Share the layer's parameters. `keep` (waves,) is False for the waves to mask."""
        super().__init__(layer.in_features, layer.out_features, bias_or_none(layer) is not None, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, input: Array) -> Array:
        """Take the waves (..., waves), and return (..., out_features)."""
        return super().forward(input * self.keep)

    def plain(self) -> nn.Linear:
        """Return an ordinary linear layer that computes this function: its weight has zeros in the masked columns."""
        layer = nn.Linear(self.in_features, self.out_features, bias_or_none(self) is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.detach() * self.keep)
        layer.bias = self.bias
        return layer


def frequencies(num_waves: int, max_frequency: float) -> Tensor:
    """Return the frequencies of the waves, (num_waves,), in rad per unit of t and float64: of cosines, then of sines.

    Each half falls from `max_frequency`.
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
    """Return the name of an embedder's first linear layer, that layer, and the second. It has two."""
    linear = [(name, layer) for name, layer in embedder.named_modules() if isinstance(layer, nn.Linear)]
    (first_name, first_layer), (_, second_layer) = linear
    return first_name, first_layer, second_layer


def cut(embedder: nn.Module, max_frequency: float, limit: float) -> LowpassFit:
    """Mask the waves of an embedder above `limit`, in place. Its quickest wave has `max_frequency`, both in rad."""
    name, first_layer, _ = linear_layers(embedder)
    w = frequencies(first_layer.in_features, max_frequency)
    keep = w <= limit
    embedder.set_submodule(name, MaskedLinear(first_layer, keep.to(first_layer.weight.device)))
    return LowpassFit(limit=limit, kept=int(keep.sum()), waves=len(w), error=None)


def refit(embedder: nn.Module, max_frequency: float, fit: LowpassFit) -> LowpassFit:
    """Train an embedder, in place, towards the curve that it had before `cut`; return `fit` with the remaining error.

    Its weights are still those that it had then. Parameters that require no gradient stay fixed.
    """
    if fit.kept == fit.waves:
        return fit
    old = copy.deepcopy(embedder)
    name, masked, _ = linear_layers(embedder)
    _, masked_copy, _ = linear_layers(old)
    assert isinstance(masked, MaskedLinear)

    # the old curve: the copy's first layer without its mask
    unmasked = nn.Linear(masked.in_features, masked.out_features, bias_or_none(masked) is not None, device="meta")
    unmasked.weight = masked_copy.weight
    unmasked.bias = masked_copy.bias
    old.set_submodule(name, unmasked)

    with torch.no_grad():
        masked.weight.mul_(masked.keep)
    error = _regress(embedder, old, frequencies(masked.in_features, max_frequency))
    return replace(fit, error=error)


def _regress(new: nn.Module, old: nn.Module, w: Tensor) -> float:
    """Train the embedder `new`, in place, towards the curve of `old`, over waves of frequencies w (waves,).

    Returns the `error` of a `LowpassFit`, at times between those of the training. It is done on a GPU where there is
    one; the weights of `new` return to their device, in float32.
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
