"""SoFlow against its formula and its authors' way to write it; the order of its secant; its schedule and edges."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dumo.flow.guide import Guide
from dumo.flow.times import Pair
from dumo.objectives import SoFlow
from dumo.testing.exact import APART, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient, stiffness
from dumo.testing.properties import loss_of
from dumo.types import NoisyBatch
from theory.exact import PRODUCT, drawn, falls
from theory.formula import Polynomial, agree, changed, half, passes, rows

MIXED = Pair(velocity_ratio=0.25)
DUMO = Guide(zeta=0.55)


def guided(b: NoisyBatch, v_c: Tensor, v_null: Tensor) -> Tensor:
    """m [v_t + fade (w - 1) (v_t - V(null))] + (1 - m) V(c), with m = 1/4 and w = 3, where the label is kept."""
    s = ((1 - b.t) / 0.2).clamp(max=1 - 1e-15)
    fade = torch.where(b.t <= 0.8, 1.0, 1 - (-0.025 * s / (1 - s)).exp())
    full = 0.25 * (b.v_t + column(fade) * 2 * (b.v_t - v_null)) + 0.75 * v_c
    return torch.where(column(b.kept), full, b.v_t).detach()


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("power", "floor"), [(1.0, 0.01), (0.75, 1e-3), (0.0, 0.01)])
def test_formula(progress: float, power: float, floor: float) -> None:
    objective = SoFlow(times=MIXED, drop=0.3, power=power, floor=floor)
    net, b = Polynomial(1), replace(rows(objective), progress=progress)
    (u,), (v_c,), (v_null,) = (net(b.x_t, c, t=b.t, r=r) for c, r in ((b.c, b.r), (b.c, b.t), (b.null, b.t)))
    v_star = guided(b, v_c, v_null)
    q = 0.1 * 0.02**progress
    moves = b.t - b.r > 1e-4
    l = torch.minimum(b.t + (b.r - b.t) * q, b.t - 1e-4)  # noqa: E741
    x_l = b.x_t + column(l - b.t) * v_star
    (u_l,) = net(x_l, b.c, t=l, r=b.r)
    quotient = (column(b.t - b.r) * u - column(l - b.r) * u_l) / column(b.t - l) - v_star  # their Delta, less its sign
    e = torch.where(column(moves), quotient, u - v_star).detach()
    size = (e**2).mean(1)
    weight = (size + floor) ** -power
    theirs = torch.where(moves, weight * (u * e).mean(1), weight * ((u - v_star) ** 2).mean(1))
    loss = torch.where(moves, 0.5, 1.0) * weight * size
    agree(objective, net, b, loss, {"u": size}, moved_as=theirs, close=1e-10, clipped_share=half(e))


@pytest.mark.parametrize(("flow", "guide"), [(APART, Guide()), (PRODUCT, Guide()), (gaussian(DUMO), DUMO)])
def test_gradient_vanishes_with_the_step(flow: ExactFlow, guide: Guide) -> None:
    """Off the exact flow by O(t - l), as one straight step is: halving it halves the gradient."""
    left = []
    for q in (0.04, 0.02, 0.01, 0.005):
        o = changed(SoFlow, min_step=1e-9, fade_start=0.9999999)(
            times=MIXED, guide=guide, drop=0.2, first=q, last=q, power=0.0
        )
        left.append(gradient(o, ExactNet(flow, o.needs), exact_batch(o, flow)).norm())
    assert falls(left, 1)
    assert left[-1] < 2e-3


def test_descent_leads_back_to_the_flow() -> None:
    o = SoFlow(times=MIXED, guide=Guide(), last=0.1)
    pull = stiffness(o, ExactNet(PRODUCT, o.needs), exact_batch(o, PRODUCT))
    assert torch.linalg.eigvals(pull).real.min() > 0.1


def test_schedule() -> None:
    """From a tenth of the way to a five-hundredth, by equal factors in equal times."""
    o = SoFlow()
    assert o.ratio(0.0) == pytest.approx(0.1)
    assert o.ratio(0.5) == pytest.approx((0.1 * 0.002) ** 0.5)
    assert o.ratio(1.0) == pytest.approx(0.002)


def test_the_secant_is_of_the_moving_rows_alone() -> None:
    """The loss is the same whether rows at rest are told by place or not; and where all rest, there is no such pass."""
    for ratio, number in ((0.5, 1), (1.0, 0)):
        o = SoFlow(times=Pair(velocity_ratio=ratio), guide=Guide())
        b, net = drawn(o, 8), Polynomial(1)
        assert passes(o, b) == (1, number)
        assert torch.allclose(loss_of(o, net, b).loss, loss_of(o, net, replace(b, moving=None)).loss, rtol=1e-9)
