"""Each loss against its formula, written out once more by hand, with a net whose derivatives are known on paper.

Away from the exact flow every weight counts, and the gradient shows whether a target was held still.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import JvpSlope
from dumo.flow.times import Pair
from dumo.objectives import DuMo, FlowMatching, MeanFlow
from dumo.types import Frozen, Heads, Noised, Objective, Terms
from theory.exact import D, column, gaussian, record, table


class Polynomial(nn.Module):
    """Head i is a_i + b_i x + c_i t x + d_i x^2 + e_i t^2 + f_i r x + label_i."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.a = nn.Parameter(torch.randn(heads, 6, generator=g, dtype=D))
        self.label = nn.Parameter(torch.randn(heads, 4, generator=g, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor | None = None) -> Heads:
        t, r = column(t), column(0 * t if r is None else r)
        at = (torch.ones_like(x), x, t * x, x**2, t**2, r * x)
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


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("beta", [0.7, 0.1])
def test_dumo(guide: Guide, beta: float) -> None:
    objective = DuMo(guide=guide, slope=JvpSlope(), beta=beta, drop=0.3)
    net, b = Polynomial(2), rows(objective)
    v, u = net(b.x_t, b.c, t=b.t)
    v_star = guided(b, guide, v, net(b.x_t, b.null, t=b.t)[0])
    du_dt = net.slope(1, b.x_t, b.t, 0 * b.t, v_star)
    u_star = v_star - column(b.t) * du_dt
    v_loss, u_loss = ((v - v_star) ** 2).sum(1) / 2, ((u - u_star) ** 2).sum(1) / 2
    apart = ((v - (u + column(b.t) * du_dt)) ** 2).sum(1) / 2
    loss, parts = beta * v_loss + (1 - beta) * u_loss, {"v": v_loss, "u": u_loss}
    agree(objective, net, b, loss, parts, beyond=half(u - u_star), apart=apart)


@pytest.mark.parametrize("guide", GUIDES)
def test_flow_matching(guide: Guide) -> None:
    objective = FlowMatching(guide=guide, drop=0.3)
    net, b = Polynomial(1), rows(objective)
    (v,), (v_null,) = net(b.x_t, b.c, t=b.t), net(b.x_t, b.null, t=b.t)
    loss = ((v - guided(b, guide, v, v_null)) ** 2).sum(1) / 2
    agree(objective, net, b, loss, {"v": loss})


@pytest.mark.parametrize(
    ("guide", "power", "floor"),
    [(g, p, c) for g in GUIDES for p, c in ((0.0, 0.01), (1.0, 0.01), (0.75, 1e-3)) if not (g.random and p)],
)
def test_meanflow(guide: Guide, power: float, floor: float) -> None:
    objective = MeanFlow(guide=guide, power=power, floor=floor, drop=0.3, times=Pair(velocity_ratio=0.5))
    net, b = Polynomial(1), rows(objective)
    (u,), (v_c,), (v_null,) = (net(b.x_t, c, t=b.t, r=r) for c, r in ((b.c, b.r), (b.c, b.t), (b.null, b.t)))
    v_star = guided(b, guide, v_c, v_null)
    u_star = v_star - column(b.t - b.r) * net.slope(0, b.x_t, b.t, b.r, v_star)
    total = ((u - u_star) ** 2).sum(1)
    loss = total / (total + floor).detach() ** power
    agree(objective, net, b, loss, {"u": total / 2}, beyond=half(u - u_star))


@pytest.mark.parametrize(
    "objective",
    [FlowMatching(), DuMo(beta=1.0, slope=JvpSlope()), MeanFlow(power=0.0, times=Pair(velocity_ratio=1.0))],
    ids=lambda o: o.kind,
)
def test_an_average_halves_the_gradient_of_v(objective: Objective) -> None:
    """Where the net's own pass is V(c), v_hat - (v_t + v_hat) / 2: half the gradient, a quarter of the loss.

    On rows of no label, and on others outside the interval. MeanFlow's u at r = t is such a v.
    """
    assert isinstance(objective, DuMo | FlowMatching | MeanFlow)
    late = Interval(low=1.0)  # no row of this record
    for drop, interval in ((1.0, Interval()), (0.0, late)):
        average = Guide(zeta=0.5, interval=interval, elsewhere="average")
        halved = objective.model_copy(update={"guide": average, "drop": drop})
        whole = objective.model_copy(update={"guide": Guide(), "drop": drop})
        net, b = Polynomial(len(objective.needs.heads)), rows(halved)[5:]  # the first are at the corners of time
        less, more = halved.loss(net, Frozen(net), b).loss, whole.loss(net, Frozen(net), b).loss
        assert torch.allclose(less, more / 4, rtol=1e-12, atol=0)
        for mine, plain in zip(gradients(less, net), gradients(more, net), strict=True):
            assert torch.allclose(mine, plain / 2, rtol=1e-11, atol=1e-14)


def test_polynomial_slopes_are_right() -> None:
    """By central differences, so that the hand has been checked too."""
    net, b = Polynomial(1), rows(MeanFlow())
    h, w = 1e-5, table([0.3, -0.7])
    ahead, behind = (net(b.x_t + s * w, b.c, t=b.t + s, r=b.r)[0] for s in (h, -h))
    assert ((ahead - behind) / (2 * h) - net.slope(0, b.x_t, b.t, b.r, w)).abs().max() < 1e-8
