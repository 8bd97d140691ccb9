"""What a loss is held against by its formula, written out by hand: a net whose derivatives are known on paper.

Away from the exact flow every weight counts, and the gradient shows whether a target was held still.
"""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from contract.case import nets
from dumo.flow.guide import Guide, Interval
from dumo.testing.exact import D, column, exact_batch, gaussian
from dumo.testing.network import CountedNet, randomise
from dumo.testing.properties import loss_of
from dumo.types import Frozen, Heads, NoisyBatch, Objective, Spec, Terms

T = TypeVar("T", bound=Spec)


def changed(cls: type[T], **constants: float) -> type[T]:
    """The class with other constants than its authors', which no option sets."""
    return type(cls.__name__, (cls,), {**constants, "__module__": cls.__module__})


class Polynomial(nn.Module):
    """Head i is a_i + b_i x + c_i t x + d_i x^2 + e_i t^2 + f_i r x + label_i."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.a = nn.Parameter(torch.randn(heads, 6, generator=g, dtype=D))
        self.label = nn.Parameter(torch.randn(heads, 4, generator=g, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor | None = None) -> Heads:
        t, r = column(t), column(0 * t if r is None else r)
        at = (0 * x + 1, x, t * x, x * x, t**2, r * x)  # x may be a Dual
        return tuple(
            sum((a * y for a, y in zip(row, at, strict=True)), column(label[c]))
            for row, label in zip(self.a, self.label, strict=True)
        )

    def slope(self, i: int, x: Tensor, t: Tensor, r: Tensor, w: Tensor) -> Tensor:
        """d/dt of head i along w, r at rest."""
        t, r, a = column(t), column(r), self.a[i].detach()
        return a[1] * w + a[2] * (x + t * w) + 2 * a[3] * x * w + 2 * a[4] * t + a[5] * r * w


def rows(objective: Objective) -> NoisyBatch:
    """A batch with slopes as they fall."""
    b = exact_batch(objective, gaussian(), 64)
    return replace(b, v_t=b.z - b.x)


def guided(b: NoisyBatch, guide: Guide, v_c: Tensor, v_null: Tensor) -> Tensor:
    """omega v_t + zeta V(c) + (1 - omega - zeta) V(null), on kept rows inside the interval; others have v_t."""
    full = guide.omega * b.v_t + guide.zeta * v_c + (1 - guide.omega - guide.zeta) * v_null
    inside = [bool(k) and guide.interval.low <= t <= guide.interval.high for k, t in zip(b.kept, b.t, strict=True)]
    return torch.where(column(torch.tensor(inside)), full.detach(), b.v_t)


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(net.parameters()), allow_unused=True))


def agree(
    objective: Objective,
    net: nn.Module,
    b: NoisyBatch,
    loss: Tensor,
    parts: dict[str, Tensor],
    *,
    ref: nn.Module | None = None,
    moved_as: Tensor | None = None,
    close: float = 1e-12,
    near: float = 0.0,
    **notes: Tensor,
) -> None:
    """Loss, parts and notes, to rounding; gradients are those of the loss, or of what it moves the weights as."""
    found: Terms = objective.loss(net, Frozen(ref or net), b)
    assert torch.allclose(found.loss, loss, rtol=close, atol=near)
    assert found.parts.keys() == parts.keys()
    assert found.notes.keys() == notes.keys()
    for key, value in (parts | notes).items():
        assert torch.allclose({**found.parts, **found.notes}[key].to(D), value, rtol=close, atol=near)
    pairs = (gradients(found.loss, net), gradients(loss if moved_as is None else moved_as, net))
    for mine, hand in zip(*pairs, strict=True):
        assert (mine is None) == (hand is None)  # of what an objective leaves alone
        assert mine is None or torch.allclose(mine, hand, rtol=10 * close, atol=close / 10 + near)


class Told(Polynomial):
    """The polynomial, of whose heads only these are told r."""

    def __init__(self, heads: int, *told: int) -> None:
        super().__init__(heads)
        self.told = told

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor | None = None) -> Heads:
        plain, told = super().forward(x, c, t=t), super().forward(x, c, t=t, r=r)
        return tuple(told[i] if i in self.told else plain[i] for i in range(len(plain)))


def half(e: Tensor) -> Tensor:
    """Share of two numbers that lie beyond 1."""
    return ((e[:, 0] ** 2 > 1).to(D) + (e[:, 1] ** 2 > 1)) / 2


def passes(objective: Objective, b: NoisyBatch) -> tuple[int, int]:
    """The passes of a step with gradients and without."""
    model = CountedNet(randomise(nets()[0].build(objective.needs, (2,), 3)).double())
    loss_of(objective, model, b)
    return model.graded, model.still


GUIDES = [Guide(), Guide(zeta=0.55, interval=Interval(low=0.2, high=0.8)), Guide(omega=0.2, zeta=0.9)]
