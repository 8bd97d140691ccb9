"""What the pulls are held against: what a pull adds to DuMo's loss, and samples of another width."""

import torch
from torch import Tensor, nn

from dumo.objectives.pull import BETA, Pull
from dumo.testing.exact import ExactNet, Gaussian, column, gaussian, growth
from dumo.testing.properties import loss_of
from dumo.types import Heads, NoisyBatch
from theory.exact import drawn
from theory.formula import gradients


def added(objective: Pull, net: nn.Module, b: NoisyBatch) -> Tensor:
    """What the pull adds to the loss of each row."""
    terms = loss_of(objective, net, b)
    return terms.loss - (BETA * terms.parts["v"] + (1 - BETA) * terms.parts["u"])


def adds(
    objective: Pull, net: nn.Module, b: NoisyBatch, loss: Tensor, moved_as: Tensor | None = None, near: float = 1e-13
) -> None:
    """Assert that this is what the pull adds, and its gradient, or that of what it moves the weights as."""
    mine = added(objective, net, b)
    assert torch.allclose(mine, loss, rtol=1e-9, atol=1e-15)
    for one, hand in zip(gradients(mine, net), gradients(loss if moved_as is None else moved_as, net), strict=True):
        assert hand is None or torch.allclose(one, hand, rtol=1e-9, atol=near)


class Wide(ExactNet):
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
    net, b = Wide(gaussian(), objective.needs), drawn(objective, n, progress=1.0)
    net.wide = wide
    (grad,) = torch.autograd.grad(added(objective, net, b).mean(), net.probe)
    return grad[1, 1].item()


def moves_samples_back(objective: Pull, weight: float) -> bool:
    """Whether samples that are too wide get narrower, and those that are too narrow wider."""
    return width_gradient(objective, 1.5) < -1e-2 * weight and width_gradient(objective, 0.6) > 1e-2 * weight
