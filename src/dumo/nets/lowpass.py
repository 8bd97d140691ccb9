"""A low-pass of a time embedder, so that a net which reads 1000 t can be tuned on its derivative (ours).

Image models begin with waves cos(w_i t), sin(w_i t) of frequencies w_i from 1000 down to 0.1 rad, and two linear layers
over them. So du/dt is large and rough: a flow map that is regressed on it diverges (docs/pretrained.md). What the
embedder has learned, though, is a curve t -> temb that hardly needs its quick waves. So

    cut      quick waves no longer enter: the first layer's columns for them are zero, and stay so;
    refit    the second layer is moved, as little as it takes, until the curve over [0, 1] is the old one.

No image is needed, and the model keeps its class and shapes: what is saved has zeros where the columns were.

With h(t) the hidden numbers once cut, and E(t) what the curve lacks, the change dW of the second layer minimises

    mean |h(t) dW^T - E(t)|^2 + ridge |dW|^2,

over POINTS times. One decomposition solves it in float64, the same on every call.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from dumo.types import Array

PERIOD = 10_000.0  # the quickest wave over the slowest, of every one of these models
POINTS = 1024  # times, at their middles
RIDGE = 1e-6  # times the largest singular value squared


@dataclass(frozen=True)
class Fit:
    """How a low-pass went."""

    limit: float  # rad per unit of t
    kept: int  # waves
    waves: int
    error: (
        float | None
    )  # root mean square of the new curve minus the old, over the old one's about its mean; None: not measured

    def __str__(self) -> str:
        off = "" if self.error is None else f"; the curve of time is off by {100 * self.error:.2g} % of its spread"
        return f"low-pass at {self.limit:g} rad: {self.kept} of {self.waves} waves of time stay{off}"


class Slow(nn.Linear):
    """A first layer that quick waves do not reach. Whatever moves their columns, they say nothing."""

    keep: Tensor  # (waves,), bool

    def __init__(self, layer: nn.Linear, keep: Tensor) -> None:
        """Takes over the layer's parameters, the columns of quick waves set to zero."""
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("keep", keep, persistent=False)
        with torch.no_grad():
            self.weight.mul_(keep)

    def forward(self, input: Array) -> Array:
        """input (..., waves)."""
        return super().forward(input * self.keep)

    def plain(self) -> nn.Linear:
        """A layer as the model had it, with zeros for the columns."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(self.weight.detach() * self.keep), self.bias
        return layer


def frequencies(waves: int, turn: float) -> Tensor:
    """Of cosines, then sines: (waves,), in rad per unit of t, each half falling from `turn`; float64."""
    half = waves // 2
    return (turn * torch.exp(-log(PERIOD) * torch.arange(half, dtype=torch.float64) / half)).repeat(2)


def waves(t: Tensor, w: Tensor) -> Tensor:
    """cos(w t) in the first half of w, sin(w t) in the second; (n, waves)."""
    angles, half = t[:, None] * w, len(w) // 2
    return torch.cat([angles[:, :half].cos(), angles[:, half:].sin()], 1)


def layers(embedder: nn.Module) -> tuple[str, nn.Linear, nn.Linear]:
    """The two linear layers of an embedder, and the name of the first."""
    (name, one), (_, two) = ((name, m) for name, m in embedder.named_modules() if isinstance(m, nn.Linear))
    return name, one, two


@torch.no_grad()
def lowpass(embedder: nn.Module, turn: float, limit: float) -> Fit:
    """Cut and refit an embedder over waves of up to `turn` rad, in place, on the CPU; on the meta device cut alone."""
    name, one, two = layers(embedder)
    with torch.device("cpu"):
        w, t = frequencies(one.in_features, turn), (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        seen, keep = waves(t, w), w <= limit
    error = None if one.weight.is_meta else refit(one, two, seen, keep)
    parent, _, last = name.rpartition(".")
    embedder.get_submodule(parent)._modules[last] = Slow(one, keep.to(one.weight.device))
    return Fit(limit, int(keep.sum()), len(w), error)


def refit(one: nn.Linear, two: nn.Linear, seen: Tensor, keep: Tensor) -> float:
    """Move the second layer so that it does without the waves not kept; returns what is left, as `Fit.error`."""

    def hidden(seen: Tensor) -> Tensor:
        h = nn.functional.silu(nn.functional.linear(seen, one.weight.double(), _double(one.bias)))
        return torch.cat([h, torch.ones_like(h[:, :1])], 1) if two.bias is not None else h

    weight = two.weight.double()
    if two.bias is not None:
        weight = torch.cat([weight, two.bias.double()[:, None]], 1)
    old = hidden(seen) @ weight.T
    h = hidden(seen * keep)
    lacks = old - h @ weight.T
    u, s, v = torch.linalg.svd(h, full_matrices=False)
    weight = weight + (v.T @ ((s / (s.square() + RIDGE * s[0].square()))[:, None] * (u.T @ lacks))).T
    two.weight.copy_(weight[:, : two.in_features])
    if two.bias is not None:
        two.bias.copy_(weight[:, -1])
    off = old - h @ weight.T
    return float(off.square().mean().sqrt() / (old - old.mean(0)).square().mean().sqrt())


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()
