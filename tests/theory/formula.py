"""What a loss is held against by its formula, written out by hand: a net whose derivatives are known on paper.

Away from the exact flow every weight counts, and the gradient shows whether a target was held still.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dumo.flow.guide import Guide, Interval
from dumo.types import Frozen, Heads, Noised, Objective, Terms
from theory.exact import D, column, gaussian, record


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


def rows(objective: Objective) -> Noised:
    """A record with slopes as they fall."""
    b = record(objective, gaussian(), 64)
    return replace(b, v_t=b.z - b.x)


def guided(b: Noised, guide: Guide, v_c: Tensor, v_null: Tensor) -> Tensor:
    """v_t + M [(omega - 1) v_t + zeta V(c) + (1 - omega - zeta) V(null)], on kept rows inside the interval.

    Of a group of 1 / fraction rows, that of the largest coin stands for all M of them, the others for none. Other rows
    have v_t, or its mean with V(c).
    """
    extra = (guide.omega - 1) * b.v_t + guide.zeta * v_c + (1 - guide.omega - guide.zeta) * v_null
    inside = [bool(k) and guide.interval.low <= t <= guide.interval.high for k, t in zip(b.kept, b.t, strict=True)]
    many = torch.zeros(len(b.t), dtype=D)
    for first in range(0, len(b.t), k := round(1 / guide.fraction)):
        group = [i for i in range(first, first + k) if inside[i]]
        if group:
            many[max(group, key=lambda i: b.coin[i].item())] = len(group)
    v_star = b.v_t + column(many) * extra.detach()
    for i in range(len(b.t)):
        if guide.elsewhere == "average" and not inside[i]:
            v_star[i] = (b.v_t[i] + v_c[i].detach()) / 2
    return v_star


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(net.parameters()), allow_unused=True))


def agree(
    objective: Objective, net: Polynomial, b: Noised, loss: Tensor, parts: dict[str, Tensor], **notes: Tensor
) -> None:
    """Loss, parts, gradients and notes, to rounding."""
    found: Terms = objective.loss(net, Frozen(net), b)
    assert torch.allclose(found.loss, loss, rtol=1e-12, atol=0)
    assert found.parts.keys() == parts.keys()
    assert found.notes.keys() == notes.keys()
    for key, value in (parts | notes).items():
        assert torch.allclose({**found.parts, **found.notes}[key].to(D), value, rtol=1e-12, atol=0)
    for mine, hand in zip(gradients(found.loss, net), gradients(loss, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-11, atol=1e-13)


def half(e: Tensor) -> Tensor:
    """Share of two numbers that lie beyond 1."""
    return ((e[:, 0] ** 2 > 1).to(D) + (e[:, 1] ** 2 > 1)) / 2


GUIDES = [Guide(), Guide(zeta=0.55, interval=Interval(low=0.2, high=0.8)), Guide(omega=0.2, zeta=0.9)]
GUIDES += [Guide(omega=0.8, zeta=0.55, interval=Interval(low=0.2, high=0.8), elsewhere="average")]
GUIDES += [g.model_copy(update={"fraction": 0.25}) for g in GUIDES[1:]]
