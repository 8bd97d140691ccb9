"""A low-pass of a time embedder, so that a net which reads 1000 t can be tuned on its derivative (ours).

Image models begin with waves cos(w_i t), sin(w_i t) of frequencies w_i from 1000 down to 0.1 rad, and two linear layers
over them. So du/dt is large and rough: a flow map that is regressed on it diverges (docs/reproduce.md). But the curve
t -> temb that the embedder has learned hardly needs its quick waves. So

    cut      quick waves no longer enter: the first layer's columns for them are zero, and stay zero;
    refit    both layers are trained until their curve over [0, 1] is the old one, as closely as slow waves allow.

The refit regresses the new curve on the old one: it needs no image, and takes seconds. The model keeps its class and
shapes; its saved weights have zeros for the cut columns.
"""

import copy
from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor, nn

from dumo.nets.twin import bias_or_none
from dumo.types import Array

PERIOD = 10_000.0  # the quickest wave over the slowest, of every one of these models
# Ours.
POINTS = 256  # times
STEPS = 1000  # of Adam
RATE = 2e-3  # of Adam, at the start of half a cosine


@dataclass(frozen=True)
class Fit:
    """The outcome of a low-pass."""

    limit: float  # rad per unit of t
    kept: int  # waves
    waves: int
    # Root mean square of the new curve minus the old, over that of the old about its mean; None: not measured.
    error: float | None

    def __str__(self) -> str:
        """One line."""
        off = "" if self.error is None else f"; the curve of time is off by {100 * self.error:.2g} % of its spread"
        return f"low-pass at {self.limit:g} rad: {self.kept} of {self.waves} waves of time stay{off}"


class Slow(nn.Linear):
    """A first layer that masks its quick waves, so that no update of their columns has an effect."""

    keep: Tensor  # (waves,), bool

    def __init__(self, layer: nn.Linear, keep: Tensor) -> None:
        """Takes over the layer's parameters."""
        super().__init__(layer.in_features, layer.out_features, bias_or_none(layer) is not None, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, input: Array) -> Array:
        """input (..., waves)."""
        return super().forward(input * self.keep)

    def plain(self) -> nn.Linear:
        """A plain linear layer, with zeros for the masked columns."""
        layer = nn.Linear(self.in_features, self.out_features, bias_or_none(self) is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.detach() * self.keep)
        layer.bias = self.bias
        return layer


def frequencies(waves: int, turn: float) -> Tensor:
    """Those of cosines, then of sines: (waves,), in rad per unit of t, each half falling from `turn`; in float64."""
    half = waves // 2
    falling = torch.exp(-log(PERIOD) * torch.arange(half, dtype=torch.float64, device="cpu") / half)
    return (turn * falling).repeat(2)


def waves(t: Array, w: Tensor) -> Array:
    """cos(w t) in the first half of w, sin(w t) in the second; (n, waves)."""
    angles = t[:, None] * w
    half = len(w) // 2
    return torch.cat([angles[:, :half].cos(), angles[:, half:].sin()], 1)


def layers(embedder: nn.Module) -> tuple[str, nn.Linear, nn.Linear]:
    """The two linear layers of an embedder, and the name of the first."""
    (name, one), (_, two) = ((name, m) for name, m in embedder.named_modules() if isinstance(m, nn.Linear))
    return name, one, two


def cut(embedder: nn.Module, turn: float, limit: float) -> Fit:
    """Mask the waves above `limit` rad of an embedder, in place. Its quickest wave has `turn` rad."""
    name, one, _ = layers(embedder)
    w = frequencies(one.in_features, turn)
    keep = w <= limit
    embedder.set_submodule(name, Slow(one, keep.to(one.weight.device)))
    return Fit(limit, int(keep.sum()), len(w), None)


def refit(embedder: nn.Module, turn: float, fit: Fit) -> Fit:
    """Train an embedder that was cut towards its old curve; returns `fit` with the remaining error."""
    if fit.kept == fit.waves:
        return fit
    old = copy.deepcopy(embedder)
    name, slow, _ = layers(embedder)
    _, first, _ = layers(old)
    assert isinstance(slow, Slow)
    whole = nn.Linear(slow.in_features, slow.out_features, bias_or_none(slow) is not None, device="meta")
    whole.weight = first.weight
    whole.bias = first.bias
    old.set_submodule(name, whole)
    with torch.no_grad():
        slow.weight.mul_(slow.keep)
    return replace(fit, error=regress(embedder, old, frequencies(slow.in_features, turn)))


def regress(new: nn.Module, old: nn.Module, w: Tensor) -> float:
    """Train an embedder towards another one's curve; returns the error between the points, as `Fit` has it.

    On a GPU where there is one; weights return to their device, in float32.
    """
    there = next(new.parameters()).device
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    t = (torch.arange(2 * POINTS, dtype=torch.float64) + 0.5) / (2 * POINTS)
    inputs = waves(t, w).float().to(here)
    trained = inputs[::2]
    between = inputs[1::2]
    new = new.to(here)
    old = old.to(here).requires_grad_(False)
    before = [p.requires_grad for p in new.parameters()]
    optimizer = torch.optim.Adam(new.requires_grad_(True).parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    curve = old(trained)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (new(trained) - curve).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        target = old(between)
        off = (new(between) - target).norm() / (target - target.mean(0)).norm()
    new.zero_grad(set_to_none=True)
    for p, graded in zip(new.to(there).parameters(), before, strict=True):
        p.requires_grad_(graded)
    return float(off)
