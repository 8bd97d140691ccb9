"""FACM: its formula by hand, its rest at the flow, its edges and passes."""

from dataclasses import replace
from math import pi

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.objectives import FACM
from dumo.testing.exact import APART, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient
from dumo.types import Frozen
from theory.exact import PRODUCT, plane
from theory.formula import Polynomial, changed, gradients, guided, half, rows

NONE, OWN = Guide(), Guide(omega=1.75, interval=Interval(high=0.875))
SWITCHES = [{}, {"clip": None}, {"cosine": False}, {"clip": 0.2}]


@pytest.mark.parametrize("guide", [NONE, OWN, Guide(zeta=0.5)], ids=["none", "own", "zeta"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("cls", [FACM, changed(FACM, power=0.0), changed(FACM, floor=0.1)])
def test_formula(guide: Guide, switches: dict[str, float | None], cls: type[FACM]) -> None:
    o = cls(guide=guide, drop=0.3, slope=JvpSlope(), **switches)
    net, b = Polynomial(1), rows(o)
    (v,), (v_null,), (u,) = (net(b.x_t, c, t=s) for c, s in ((b.c, -b.t), (b.null, -b.t), (b.c, b.t)))
    v_star = guided(b, guide, v, v_null)
    error = u - (v_star - column(b.t) * net.slope(0, b.x_t, b.t, 0 * b.t, v_star))
    most = o.clip or 1e9
    alpha = 1 - (1 - b.t) ** 0.5
    u_goal = (u - column(alpha) * error.clamp(-most, most)).detach()
    u_loss = ((u - u_goal) ** 2).mean(1)
    loss = ((v - v_star) ** 2).mean(1) + u_loss / (u_loss + o.floor).detach() ** o.power * (pi * b.t / 2).sin()
    if o.cosine:
        loss = loss + 1 - cosine_similarity(v, v_star)
    found = o.loss(net, Frozen(net), b)
    assert torch.allclose(found.loss, loss, rtol=1e-10, atol=1e-3 if o.cosine else 0)  # short directions count less
    assert torch.allclose(found.parts["v"], ((v - v_star) ** 2).mean(1), rtol=1e-12, atol=0)
    assert torch.allclose(found.parts["u"], (error**2).mean(1), rtol=1e-12, atol=0)
    assert torch.allclose(found.notes["clipped_share"].double(), half(error / (o.clip or 1)))
    for mine, hand in zip(gradients(found.loss, net), gradients(loss, net), strict=True):
        bound = 2e-3 if o.cosine else 1e-10
        assert torch.allclose(mine, hand, rtol=bound, atol=bound * hand.abs().max().item())


def at_rest(o: FACM, flow: ExactFlow, n: int = 256) -> float:
    return gradient(o, ExactNet(flow, o.needs), exact_batch(o, flow, n)).abs().max().item()


@pytest.mark.slow
def test_it_rests_at_the_flow() -> None:
    """With every switch as the authors have it. Measured: 1e-14."""
    for flow, guide in ((gaussian(OWN), OWN), (APART, NONE), (PRODUCT, NONE)):
        assert at_rest(FACM(guide=guide, drop=0.2, slope=DualSlope()), flow) < 1e-12
    guide = Guide(omega=1.75)
    assert at_rest(FACM(guide=guide, drop=0.2, slope=DualSlope()), plane(guide), 64) < 1e-10


def test_the_angle() -> None:
    """Of one channel it knows the sign alone: nothing to learn."""
    o = FACM(guide=NONE)
    net, b = Polynomial(1), rows(o)
    one = replace(b, x_t=b.x_t[:, :1], v_t=b.v_t[:, :1], x=b.x[:, :1], z=b.z[:, :1])
    with_, without = (FACM(guide=NONE, cosine=cosine).loss(net, Frozen(net), one).loss for cosine in (True, False))
    turn: Tensor = with_ - without
    assert ((turn < 1e-3) | ((turn - 2).abs() < 1e-3)).double().mean() > 0.9
