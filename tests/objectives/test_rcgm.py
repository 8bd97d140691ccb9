"""RCGM against its formula and its authors' way to write it; the order of its step, whatever N is; its edges."""

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
import torch

from dumo.flow.guide import Guide
from dumo.flow.times import Pair
from dumo.objectives import RCGM
from dumo.testing.exact import APART, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient, stiffness
from theory.exact import PRODUCT, falls
from theory.formula import GUIDES, Polynomial, agree, changed, guided, half, rows

MIXED = Pair(velocity_ratio=0.25)
DUMO = Guide(zeta=0.55)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(("order", "clip"), [(1, inf), (2, 1.0), (3, 1.0)])
def test_formula(guide: Guide, order: int, clip: float) -> None:
    """As `get_rcgm_target` has it, with factors of 1 / h and none, so that r = t gives no 0 / 0."""
    objective = changed(RCGM, clip=clip, step=0.05)(guide=guide, order=order, drop=0.3)
    net, b = Polynomial(1), rows(objective)
    (u,), (v_c,), (v_null,) = (net(b.x_t, c, t=b.t, r=r) for c, r in ((b.c, b.r), (b.c, b.t), (b.null, b.t)))
    v_star = guided(b, guide, v_c, v_null)
    x, start, total = b.x_t - 0.05 * v_star, torch.maximum(b.t - 0.05, b.r), 0
    times = [start + (b.r - start) * i / order for i in range(order + 1)]
    for now, then in pairwise(times):
        (u_i,) = net(x, b.c, t=now, r=then)
        x, total = x - column(now - then) * u_i, total + column(now - then) * u_i
    near = column(b.t < b.r + 0.05)
    off = (torch.where(near, u, 20 * (column(b.t - b.r) * u - total)) - v_star).detach()
    e = off.clamp(-clip, clip)
    assert (e != off).any() == (clip < inf)
    (u,) = net(b.x_t, b.c, t=b.t, r=b.r)
    square = ((u - (u.detach() - e)) ** 2).mean(1)
    agree(objective, net, b, square, {"u": (e**2).mean(1)}, close=1e-10, clipped_share=half(off / clip))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("flow", "guide"), [(APART, Guide()), (PRODUCT, Guide()), (gaussian(DUMO), DUMO)])
def test_gradient_vanishes_with_the_step(flow: ExactFlow, guide: Guide, order: int) -> None:
    """Off the exact flow by O(h), for the first step is straight; the N jumps after it are exact."""
    left = []
    for h in (0.02, 0.01, 0.005, 0.0025):
        o = changed(RCGM, step=h, clip=inf)(times=MIXED, guide=guide, drop=0.2, order=order)
        b = exact_batch(o, flow, 128)
        b = replace(b, r=torch.where(b.t - b.r < 0.02, b.t, b.r))  # the same rows within h of t for all h
        left.append(gradient(o, ExactNet(flow, o.needs), b).norm())
    assert falls(left, 1)
    assert left[-1] < 2e-2


def test_descent_leads_back_to_the_flow() -> None:
    o = RCGM(times=MIXED, guide=Guide(), order=2)
    pull = stiffness(o, ExactNet(PRODUCT, o.needs), exact_batch(o, PRODUCT, 64))
    assert torch.linalg.eigvals(pull).real.min() > 0.1
