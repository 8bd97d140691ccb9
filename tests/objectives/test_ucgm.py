"""UCGM against its formula and its authors' way to write it, at every ratio; FM+; orders and edges."""

from dataclasses import replace
from itertools import pairwise
from math import pi

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contract.case import Counted, nets, randomise
from dumo.flow.draw import draw
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.residual import huber, rmse, turned
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.objectives import UCGM, DuMo, FlowMatching
from dumo.types import Frozen, UserError
from theory.exact import APART, PRODUCT, D, Exact, Flow, column, gradient, record
from theory.formula import GUIDES, Polynomial, gradients, guided, half, rows

PLAIN = {"clip": None, "gain": False, "soft": None, "fall": False}


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
@pytest.mark.parametrize(("clip", "soft"), [(1.0, 5.0), (None, 0.3)])
def test_formula(ratio: float, clip: float | None, soft: float) -> None:
    objective = UCGM(ratio=ratio, slope=JvpSlope(), clip=clip, soft=soft, drop=0.3)
    net, b = Polynomial(1), rows(objective)[5:]  # the first are at the corners of time
    (u,) = net(b.x_t, b.c, t=b.t)
    e = off(net, b.x, b.z, b.c, b.t, ratio).detach()
    bounded = e if clip is None else e.clamp(-clip, clip)
    assert (bounded != e).any() == (clip is not None)
    target = (u - column(b.t * 4 / torch.sin(b.t * 1.57)) * bounded).detach()
    loss = ((((u - target) ** 2).mean(1) + soft**2).sqrt() - soft) * torch.cos(b.t * 1.57)
    found = objective.loss(net, Frozen(net), b)
    assert torch.allclose(found.loss, loss, rtol=1e-9)
    assert torch.allclose(found.parts["u"], (e**2).mean(1), rtol=1e-9)
    assert torch.allclose(found.notes["clipped_share"].double(), half(e))
    for mine, hand in zip(gradients(found.loss, net), gradients(loss, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("guide", [g for g in GUIDES if not g.random])
def test_fm_plus(guide: Guide) -> None:
    """At ratio 0 the root of the mean square, and 1 - cos over channels, with no bound and no gain."""
    objective = UCGM(ratio=0.0, guide=guide, soft=0.0, cosine=True, drop=0.3)
    net, b = Polynomial(1), rows(objective)
    assert objective.needs.heads == ("v",)
    (v,), (v_null,) = (net(b.x_t, c, t=b.t) for c in (b.c, b.null))
    v_star = guided(b, guide, v, v_null)
    one, other = (a / ((a**2).sum(1, keepdim=True) + 1e-6).sqrt() for a in (v, v_star))  # 1 - cos is half their chord^2
    loss = ((v - v_star) ** 2).mean(1).sqrt() + ((one - other) ** 2).sum(1) / 2
    loss = loss * torch.cos(b.t * 1.57)
    found = objective.loss(net, Frozen(net), b)
    assert torch.allclose(found.loss, loss, rtol=1e-9)
    for mine, hand in zip(gradients(found.loss, net), gradients(loss, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-8, atol=1e-10)


def test_guidance_asks_theta_and_alignment_the_weights_in_training() -> None:
    """V(null) is of an average; F at ratio t is not."""
    other = Polynomial(1)
    other.a.data += 1
    net, fm = Polynomial(1), UCGM(ratio=0.0, guide=Guide(zeta=0.5))
    b = rows(fm)
    for o, moved in ((fm, True), (UCGM(ratio=0.5), False), (UCGM(slope=JvpSlope()), False)):
        one, two = (o.loss(net, Frozen(ref), b).loss for ref in (net, other))
        assert torch.equal(one, two) != moved


def test_measures() -> None:
    g = torch.Generator().manual_seed(0)
    e, w = (torch.randn(4, 3, 5, generator=g, dtype=D) for _ in range(2))
    square = e.square().flatten(1).mean(1)
    assert torch.allclose(rmse(e), square.sqrt())
    assert torch.allclose(huber(e, 0.7), (square + 0.49).sqrt() - 0.7)
    assert torch.equal(huber(e, 0.0), rmse(e))
    small = 1e-9 * e.float()
    assert torch.allclose(huber(small, 5.0), small.square().flatten(1).mean(1) / 10, atol=0)
    cosine = F.cosine_similarity(e, w, dim=1).mean(1)
    assert torch.allclose(turned(e, w), 1 - cosine, atol=1e-4)
    nothing = torch.zeros(2, 3, dtype=D, requires_grad=True)
    for loss in (rmse(nothing), huber(nothing, 0.0), turned(nothing, w[:2, :, 0])):
        (grad,) = torch.autograd.grad(loss.sum(), nothing)
        assert grad.abs().max() < 1e4


@pytest.mark.parametrize("flow", [APART, PRODUCT])
def test_gradient_vanishes_as_the_ratio_tends_to_1(flow: Flow) -> None:
    """Off the exact flow by O(1 - ratio), for the line to ratio t is straight; at 1 it is exact."""
    left = []
    for ratio in (0.96, 0.98, 0.99, 0.995):
        o = UCGM(ratio=ratio, drop=0.2)
        left.append(gradient(o, Exact(flow, o.needs), record(o, flow)).norm())
    for coarse, fine in pairwise(left):
        assert abs((coarse / fine).log2() - 1) < 0.1
    o = UCGM(slope=JvpSlope(), drop=0.2)
    assert gradient(o, Exact(flow, o.needs), record(o, flow)).norm() < 1e-12


@pytest.mark.parametrize("flow", [APART, PRODUCT])
def test_gradient_vanishes_with_the_square_of_a_central_step(flow: Flow) -> None:
    """Where t - h is no time below 0, which to the exact net are a task of their own."""
    left = []
    for h in (0.04, 0.02, 0.01, 0.005):
        o = UCGM(slope=CentralSlope(h=h), drop=0.2)
        b = record(o, flow)
        left.append(gradient(o, Exact(flow, o.needs), b.at(b.t.clamp(min=0.05))).norm())
    for coarse, fine in pairwise(left):
        assert abs((coarse / fine).log2() - 2) < 0.1


@pytest.mark.parametrize("guide", [Guide(), Guide(zeta=0.5)])
def test_at_ratio_0_without_weights_it_is_flow_matching(guide: Guide) -> None:
    mine, other = UCGM(ratio=0.0, guide=guide, **PLAIN), FlowMatching(guide=guide)
    net, b = Polynomial(1), rows(mine)
    one, two = (o.loss(net, Frozen(net), b).loss for o in (mine, other))
    assert torch.equal(one, two)
    assert all(torch.equal(a, c) for a, c in zip(gradients(one, net), gradients(two, net), strict=True))


@pytest.mark.parametrize("slope", [CentralSlope(), DualSlope(), JvpSlope()], ids=lambda s: s.kind)
def test_at_ratio_1_without_weights_it_is_the_second_head_of_dumo(slope: Slope) -> None:
    class Twice(Polynomial):
        def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor | None = None) -> tuple[Tensor, ...]:
            (u,) = super().forward(x, c, t=t, r=r)
            return u, u

    mine, other = UCGM(slope=slope, **PLAIN), DuMo(beta=0.0, guide=Guide(), slope=slope)
    net, twice = Polynomial(1), Twice(1)
    b = rows(mine)
    one, two = (o.loss(n, Frozen(n), b).loss for o, n in ((mine, net), (other, twice)))
    assert torch.allclose(one, two, rtol=1e-12)
    for a, c in zip(gradients(one, net), gradients(two, twice), strict=True):
        assert torch.allclose(a, c, rtol=1e-11, atol=1e-13)


def test_rows_at_the_data_are_flow_matching() -> None:
    """At t = 0 F is the velocity: the gradient is flow matching's times (8 / pi) / 2 (mean square + c^2)^(1/2)."""
    mine = UCGM(slope=JvpSlope(), clip=None)
    net, b = Polynomial(1), rows(mine)
    b = b.at(0 * b.t)
    (u,) = net(b.x_t, b.c, t=b.t)
    plain = ((u - b.v_t) ** 2).mean(1)
    gain = 4 / 1.57
    assert gain == pytest.approx(8 / pi, rel=1e-3)
    weight = (gain / 2 / (gain**2 * plain + 25).sqrt()).detach()
    found = mine.loss(net, Frozen(net), b).loss
    for a, c in zip(gradients(found, net), gradients(weight * plain, net), strict=True):
        assert torch.allclose(a, c, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_edges(ratio: float) -> None:
    """No time makes it infinite, be it rounded to bf16."""
    o = UCGM(ratio=ratio, slope=JvpSlope())
    t = torch.tensor([0, 1e-5, 1e-4, 0.5, 1 - 1e-5, 1], dtype=D)
    net, b = Polynomial(1), rows(o)[:6]
    for s in (t, t.bfloat16().double()):
        terms = o.loss(net, Frozen(net), b.at(s))
        assert terms.loss.isfinite().all()
        assert (terms.loss > 0).all()
        assert all(g.isfinite().all() for g in gradients(terms.loss, net) if g is not None)


@pytest.mark.parametrize(
    ("objective", "graded", "still"),
    [
        (UCGM(), 1, 2),
        (UCGM(slope=DualSlope()), 1, 0),
        (UCGM(ratio=0.5), 1, 1),
        (UCGM(ratio=0.0), 1, 0),
        (UCGM(ratio=0.0, guide=Guide(zeta=0.44)), 1, 1),
    ],
)
def test_passes(objective: UCGM, graded: int, still: int) -> None:
    net = Counted(randomise(nets()[0].build(objective.needs, (2, 4, 4), 3)))
    x, c = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.long)
    b = draw(objective, Linear(), x, c, c + 3, seed=0, step=0)
    objective.loss(net, Frozen(net), b)
    assert (net.graded, net.still) == (graded, still)
    reads = objective.read(net)
    assert (reads.velocity is None, reads.endpoint is None) == (bool(objective.ratio), not objective.ratio)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"ratio = 0\.5 it is not: guide by a teacher"):
        UCGM(ratio=0.5, guide=Guide(zeta=0.5))
    with pytest.raises(ValueError, match="soft=null"):
        UCGM(ratio=0.0, guide=Guide(zeta=0.5, fraction=0.5))
    assert UCGM(ratio=0.0, guide=Guide(zeta=0.5, fraction=0.5), soft=None).guide.random
    net, b = Polynomial(1), rows(UCGM())
    b = replace(b, x_t=b.x_t.bfloat16())
    with pytest.raises(UserError, match=r"'ucgm' needs precision fp32"):
        UCGM(ratio=0.99).loss(net, Frozen(net), b)
