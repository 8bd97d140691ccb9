"""What the pulls are held against: rows to pull, what a pull adds to DuMo's loss, and samples of another width."""

import torch
from torch import Tensor

from contract.case import step
from dumo.flow.draw import draw
from dumo.flow.path import Linear
from dumo.objectives.pull import BETA, Pull
from dumo.types import Heads, Noised
from theory.exact import Exact, Gaussian, column, gaussian, growth


def drawn(objective: Pull, n: int = 16, progress: float = 1.0) -> Noised:
    """Rows as training draws them."""
    flow, g = gaussian(), torch.Generator().manual_seed(1)
    c = torch.arange(n) % flow.classes
    null = torch.full_like(c, flow.classes)
    return draw(objective, Linear(), flow.data(c, g), c, null, seed=0, step=0, progress=progress)


def added(objective: Pull, net: torch.nn.Module, b: Noised) -> Tensor:
    """What the pull adds to the loss of each row."""
    terms = step(objective, net, b)
    return terms.loss - (BETA * terms.parts["v"] + (1 - BETA) * terms.parts["u"])


class Wide(Exact):
    """The exact flow of data, but samples are `wide` times as wide, and w and d know it."""

    wide = 1.0

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, **inputs: Tensor) -> Heads:
        heads = dict(zip(self.needs.heads, super().forward(x, c, t=t, **inputs), strict=True))
        assert isinstance(self.flow, Gaussian)
        std = self.wide * self.flow.std[c]
        heads["u"] = torch.where(column(t == 1), x - column(std) * x + self.probe[1, 1] * x, heads["u"])
        known = {"w": lambda: column(growth(std, t)) * x, "d": lambda: (1 - self.wide) * x * x}
        heads |= {name: said() for name, said in known.items() if name in heads}
        return tuple(heads.values())


def width_gradient(objective: Pull, wide: float, n: int = 256) -> float:
    """d loss of the pull / d probe of u: above 0 where descent makes samples wider."""
    net, b = Wide(gaussian(), objective.needs), drawn(objective, n)
    net.wide = wide
    (grad,) = torch.autograd.grad(added(objective, net, b).mean(), net.probe)
    return grad[1, 1].item()
