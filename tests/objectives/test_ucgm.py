"""UCGM against its formula and its authors' way to write it, at every ratio; FM+; orders and edges."""

from dataclasses import replace
from math import inf

import pytest
import torch
from torch import Tensor

from dumo.flow.residual import huber, rmse
from dumo.flow.slope import JvpSlope
from dumo.objectives import UCGM
from dumo.testing.exact import APART, D, ExactFlow, ExactNet, column, exact_batch, gradient
from dumo.types import Frozen, UserError
from theory.exact import PRODUCT, falls
from theory.formula import Polynomial, agree, changed, half, rows


def off(net: Polynomial, x: Tensor, z: Tensor, c: Tensor, t: Tensor, ratio: float) -> Tensor:
    """- df/dt with f = x_t - t F, at both ends of the straight line, or as its derivative."""

    def f(t: Tensor) -> Tensor:
        x_t = column(t) * z + column(1 - t) * x
        return x_t - column(t) * net(x_t, c, t=t)[0]

    if ratio < 1:
        return (f(ratio * t) - f(t)) / column(t - ratio * t)
    x_t, v = column(t) * z + column(1 - t) * x, z - x
    return net(x_t, c, t=t)[0] + column(t) * net.slope(0, x_t, t, 0 * t, v) - v


@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.0])
@pytest.mark.parametrize(("clip", "soft"), [(1.0, 5.0), (inf, 0.3)])
def test_formula(ratio: float, clip: float, soft: float) -> None:
    objective = changed(UCGM, clip=clip)(ratio=ratio, slope=JvpSlope(), soft=soft, drop=0.3)
    net, b = Polynomial(1), rows(objective)[5:]  # the first are at the corners of time
    (u,) = net(b.x_t, b.c, t=b.t)
    e = off(net, b.x, b.z, b.c, b.t, ratio).detach()
    bounded = e.clamp(-clip, clip)
    assert (bounded != e).any() == (clip < inf)
    target = (u - column(b.t * 4 / torch.sin(b.t * 1.57)) * bounded).detach()
    loss = ((((u - target) ** 2).mean(1) + soft**2).sqrt() - soft) * torch.cos(b.t * 1.57)
    other = Polynomial(1)
    other.a.data += 1  # theta^- has no part in it
    agree(objective, net, b, loss, {"u": (e**2).mean(1)}, ref=other, close=1e-10, clipped_share=half(e / clip))


def test_fm_plus() -> None:
    """At ratio 0 the root of the mean square, with no bound and no gain."""
    objective = UCGM(ratio=0.0, soft=0.0, drop=0.3)
    net, b = Polynomial(1), rows(objective)
    assert objective.needs.heads == ("v",)
    (v,) = net(b.x_t, b.c, t=b.t)
    e = v - b.v_t
    loss = (e**2).mean(1).sqrt() * torch.cos(b.t * 1.57)
    agree(objective, net, b, loss, {"v": (e**2).mean(1)}, close=1e-9, clipped_share=half(e))


def test_measures() -> None:
    g = torch.Generator().manual_seed(0)
    e = torch.randn(4, 3, 5, generator=g, dtype=D)
    square = e.square().flatten(1).mean(1)
    assert torch.allclose(rmse(e), square.sqrt())
    assert torch.allclose(huber(e, 0.7), (square + 0.49).sqrt() - 0.7)
    assert torch.equal(huber(e, 0.0), rmse(e))
    small = 1e-9 * e.float()
    assert torch.allclose(huber(small, 5.0), small.square().flatten(1).mean(1) / 10, atol=0)
    nothing = torch.zeros(2, 3, dtype=D, requires_grad=True)
    for loss in (rmse(nothing), huber(nothing, 0.0)):
        (grad,) = torch.autograd.grad(loss.sum(), nothing)
        assert grad.abs().max() < 1e4


@pytest.mark.slow
@pytest.mark.parametrize("flow", [APART, PRODUCT])
def test_gradient_vanishes_as_the_ratio_tends_to_1(flow: ExactFlow) -> None:
    """Off the exact flow by O(1 - ratio), for the line to ratio t is straight; at 1 it is exact."""
    left = []
    for ratio in (0.96, 0.98, 0.99, 0.995):
        o = UCGM(ratio=ratio, drop=0.2)
        left.append(gradient(o, ExactNet(flow, o.needs), exact_batch(o, flow)).norm())
    assert falls(left, 1)
    o = UCGM(slope=JvpSlope(), drop=0.2)
    assert gradient(o, ExactNet(flow, o.needs), exact_batch(o, flow)).norm() < 1e-12


def test_refusals() -> None:
    net, b = Polynomial(1), rows(UCGM())
    b = replace(b, x_t=b.x_t.bfloat16())
    with pytest.raises(UserError, match=r"'ucgm' needs precision fp32"):
        UCGM(ratio=0.99).loss(net, Frozen(net), b)
