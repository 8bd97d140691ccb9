"""Flows of mixtures, whose every quantity is known, beside the Gaussian ones of `dumo.testing.exact`. All in float64.

Each component stays Gaussian along the linear path. The velocity is the mean of the components' velocities under the
posterior of the component, and the flow x_t -> x_r is

- of a mixture in one dimension, by quantiles: the flow keeps the order of points, so F_r(x_r) = F_t(x_t);
- of anything else, by Runge and Kutta.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.testing.exact import PLAIN, D, ExactFlow, RowGuide, column, gaussian, spread, table
from dumo.types import NoisyBatch, Objective


@dataclass(frozen=True)
class Mixture(ExactFlow):
    """Gaussian components shared by all classes, which differ in their weights; guided by w at all times."""

    weight: Tensor  # (classes + 1, k), rows sum to 1
    mean: Tensor  # (k, d)
    std: Tensor  # (k, d)
    guide: Guide | RowGuide = PLAIN

    @property
    def classes(self) -> int:
        return len(self.weight) - 1

    def data(self, c: Tensor, g: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weight[c], 1, generator=g)[:, 0]
        return self.mean[k] + self.std[k] * torch.randn(self.mean[k].shape, generator=g, dtype=D)

    def velocity(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """The mean of the components' velocities, each as likely as it is at x."""
        log, v = self._components(x, t)
        return (self._likely(log, c) * v).sum(1)

    def guided(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        log, v = self._components(x, t)
        likely, w = self._likely(log, c), torch.as_tensor(self.guide.scale, dtype=D).reshape(-1, 1, 1)
        if (w != 1).any():
            likely = w * likely + (1 - w) * self._likely(log, torch.full_like(c, self.classes))
        return (likely * v).sum(1)

    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return integrate(lambda x, t: self.guided(x, c, t), x, t, r)

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of each component, the log of its density at x, coordinate by coordinate, and its velocity: (b, k, d)."""
        t = t[:, None, None]
        off, variance = x[:, None] - (1 - t) * self.mean, t**2 + (1 - t) ** 2 * self.std**2
        v = (t - (1 - t) * self.std**2) / variance * off - self.mean
        return -(off**2 / variance + variance.log()) / 2, v

    def _likely(self, log: Tensor, c: Tensor) -> Tensor:
        """The share of each component at x: one for the whole point."""
        return (log.sum(-1, keepdim=True) + self.weight[c].log()[..., None]).softmax(1)


@dataclass(frozen=True)
class Product(Mixture):
    """Every coordinate a mixture of its own: the flow acts on each alone, and moves quantiles to quantiles."""

    def data(self, c: Tensor, g: torch.Generator) -> Tensor:
        columns = [super(Product, self).data(c, g)[:, i] for i in range(self.mean.shape[1])]
        return torch.stack(columns, 1)

    def carry(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Bisect for F_r(x_r) = F_t(x_t); a last step of Newton's carries the derivatives."""
        assert (torch.as_tensor(self.guide.scale) == 1).all(), "guidance mixes two flows: no quantiles"
        level = self.share(x, c, t)
        low, high = torch.full_like(x, -20).detach(), torch.full_like(x, 20).detach()
        for _ in range(60):
            middle = (low + high) / 2
            below = (self.share(middle, c, r) < level).detach()
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        y = ((low + high) / 2).detach()
        return y - (self.share(y, c, r) - level) / self.density(y, c, r).detach()

    def log_stretch(self, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """By the densities, since `carry` has no second derivatives."""
        return (self.density(self.carry(x, c, t, r), c, r) / self.density(x, c, t)).log()

    def share(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """F_t(x) of each coordinate, less a half."""
        t = t[:, None, None]
        deep = (x[:, None] - (1 - t) * self.mean) / spread(self.std, t)
        return (self.weight[c][..., None] * torch.erf(deep / sqrt(2))).sum(1) / 2

    def density(self, x: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """p_t(x) of each coordinate."""
        t = t[:, None, None]
        deep = (x[:, None] - (1 - t) * self.mean) / spread(self.std, t)
        bell = (-(deep**2) / 2).exp() / (spread(self.std, t) * sqrt(2 * torch.pi))
        return (self.weight[c][..., None] * bell).sum(1)

    def _likely(self, log: Tensor, c: Tensor) -> Tensor:
        """The share of each component at x: one for each coordinate."""
        return (log + self.weight[c].log()[..., None]).softmax(1)


def integrate(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r by eight explicit Runge-Kutta steps of order 12: midpoint rules of n substeps, extrapolated (Gragg 1965)."""
    fine = (2, 4, 6, 8, 10, 12)
    weight = [prod(n**2 / (n**2 - k**2) for k in fine if k != n) for n in fine]  # their errors are even in 1 / n
    h = (r - t) / 8
    for i in range(8):
        x = sum((w * _midpoint(f, x, t + i * h, h, n) for w, n in zip(weight, fine, strict=True)), 0 * x)
    return x


def _midpoint(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, h: Tensor, n: int) -> Tensor:
    """x after a time h, in n leaps over the last point."""
    dt = h / n
    last, x = x, x + column(dt) * f(x, t)
    for k in range(1, n):
        last, x = x, last + 2 * column(dt) * f(x, t + k * dt)
    return (last + x + column(dt) * f(x, t + h)) / 2


def plane(guide: Guide = PLAIN) -> Mixture:
    """Two classes of two components each, in the plane; the null has all four."""
    weight = table([0.4, 0.6, 0, 0], [0, 0, 0.5, 0.5], [0.2, 0.3, 0.25, 0.25])
    mean, std = (
        table([-0.8, 0.6], [0.7, -0.5], [0.4, 0.9], [-0.3, -0.9]),
        table([0.7, 0.8], [0.8, 0.7], [0.9, 0.6], [0.7, 0.7]),
    )
    return Mixture(weight, mean, std, guide)


PRODUCT = Product(
    weight=table([0.3, 0.7, 0.0], [0.5, 0.2, 0.3], [0.2, 0.5, 0.3]),
    mean=table([-1.0, 0.8], [0.4, -0.6], [1.0, 0.0]),
    std=table([0.3, 0.5], [0.4, 0.3], [0.6, 0.4]),
)


def drawn(
    objective: Objective, n: int = 64, flow: ExactFlow | None = None, *, teacher: bool = False, progress: float = 0.0
) -> NoisyBatch:
    """Rows as training draws them; with a teacher, v_t is its mean."""
    flow, g = flow or gaussian(), torch.Generator().manual_seed(1)
    c = torch.arange(n) % flow.classes
    mean = (lambda x, t, c, v: flow.velocity(x, c, t)) if teacher else None
    key: dict[str, Any] = {"seed": 0, "step": 0, "progress": progress, "teacher": mean}
    return draw(objective, Linear(), flow.data(c, g), c, torch.full_like(c, flow.classes), **key)


def falls(left: Sequence[Tensor], order: float, within: float = 0.1) -> bool:
    """Whether errors, of steps each half of the one before, are of this order."""
    return all(((coarse / fine).log2() - order).abs().max() < within for coarse, fine in pairwise(left))
