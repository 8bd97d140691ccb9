"""alpha-Flow against its formula and its authors' way to weigh it, at every alpha; its schedule, order and edges."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import exp, inf, log

import pytest
import torch

from dumo.flow.guide import Guide
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.flow.times import Pair
from dumo.objectives import AlphaFlow
from dumo.testing.exact import APART, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient
from dumo.testing.properties import loss_of
from dumo.types import frozen
from theory.exact import PRODUCT, drawn
from theory.formula import GUIDES, Polynomial, agree, changed, guided, half, passes, rows

MIXED = Pair(velocity_ratio=0.25)
DUMO = Guide(zeta=0.55)
WIDE = {"begin": 0.0, "end": 1.0}


def test_schedule() -> None:
    """1 - sigmoid(25 s) for s from -1/2 to 1/2 between begin and end; 1 before and 0 after, and where it is near."""
    o = AlphaFlow(begin=0.2, end=0.6)
    assert [o.alpha(p) for p in (0.0, 0.2, 0.3, 0.5, 0.6, 1.0)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert o.alpha(0.4) == 0.5
    assert o.alpha(0.38) == pytest.approx(1 / (1 + exp(-25 * 0.05)))
    some = [o.alpha(0.2 + 0.4 * i / 1000) for i in range(1001)]
    assert all(a >= b for a, b in pairwise(some))
    assert min(a for a in some if a) > 0.005
    assert max(a for a in some if a < 1) < 0.995
    at_once = AlphaFlow(begin=0.5, end=0.5)
    assert [at_once.alpha(p) for p in (0.4, 0.5, 0.6)] == [1.0, 0.0, 0.0]
    assert AlphaFlow(begin=0, end=0).alpha(0.0) == 0.0
    with pytest.raises(ValueError, match="begin"):
        AlphaFlow(begin=0.6, end=0.5)


def test_the_target_of_a_step_is_bounded_by_4() -> None:
    """The authors' clamp_utgt."""
    objective = AlphaFlow(times=MIXED, **WIDE)
    b = rows(objective)
    far = 100 * b.v_t.sign()
    assert torch.equal(objective._u_star(frozen(Polynomial(1)), b, far, 1.0), 4 * b.v_t.sign())


@pytest.mark.parametrize("progress", [0.0, 0.45, 0.55, 0.65, 1.0])
@pytest.mark.parametrize("guide", GUIDES[1:])
@pytest.mark.parametrize("clip", [1.0, inf])
def test_formula(progress: float, guide: Guide, clip: float) -> None:
    """The authors' loss, alpha (u - u*)^2 / (its mean + eps) where r < t: another value, and the same gradient."""
    objective = changed(AlphaFlow, clip=clip)(times=MIXED, guide=guide, drop=0.3, **WIDE)
    net, b = Polynomial(1), replace(rows(objective), progress=progress)
    alpha, moves = objective.alpha(progress), b.r < b.t
    (u,), (v_c,), (v_null,) = (net(b.x_t, c, t=b.t, r=r) for c, r in ((b.c, b.r), (b.c, b.t), (b.null, b.t)))
    v_star = guided(b, guide, v_c, v_null)
    step = alpha * (b.t - b.r)
    if alpha:
        (u_l,) = net(b.x_t - column(step) * v_star, b.c, t=b.t - step, r=b.r)
        share = torch.where(moves, step / (b.t - b.r), 1)
        far = column(share) * v_star + column(1 - share) * u_l.detach()
        far = torch.where(column(moves), far.clamp(-clip, clip), far)
        weight = torch.ones_like(b.t).where(~moves, alpha)
    else:
        far = v_star - column(b.t - b.r) * net.slope(0, b.x_t, b.t, b.r, v_star)
        weight = torch.ones_like(b.t)
    size = ((u - far) ** 2).mean(1)
    theirs = weight * size / (size.detach() + 1e-3)
    e = (u - far).detach() / column(weight)
    size = (e**2).mean(1)
    loss = size / (size + 1e-3 / weight**2)
    agree(objective, net, b, loss, {"u": size}, moved_as=theirs, close=1e-9, clipped_share=half(e))


@pytest.mark.parametrize(("flow", "guide"), [(APART, Guide()), (PRODUCT, Guide()), (gaussian(DUMO), DUMO)])
def test_gradient_vanishes_with_alpha(flow: ExactFlow, guide: Guide) -> None:
    """Off the exact flow by O(alpha (t - r)); the floor, so large that it weighs all rows alike."""
    found = []
    for progress in (0.55, 0.58, 0.61, 0.64):
        o = changed(AlphaFlow, floor=1e6, clip=inf)(times=MIXED, guide=guide, drop=0.2, **WIDE)
        b, alpha = replace(exact_batch(o, flow), progress=progress), o.alpha(progress)
        found.append((alpha, (gradient(o, ExactNet(flow, o.needs), b) / alpha**2).norm()))
    for (large, coarse), (small, fine) in pairwise(found):
        assert abs((coarse / fine).log() / log(large / small) - 1) < 0.2


@pytest.mark.parametrize("slope", [DualSlope(), JvpSlope()], ids=lambda s: s.kind)
def test_it_rests_at_the_flow_when_alpha_is_zero_and_elsewhere_before(slope: DualSlope | JvpSlope) -> None:
    """At the start it is flow matching along trajectories: u* = v* on rows of r < t, too, which no u obeys."""
    for flow, guide in ((PRODUCT, Guide()), (gaussian(DUMO), DUMO)):
        o = AlphaFlow(times=MIXED, guide=guide, drop=0.2, slope=slope)
        net, b = ExactNet(flow, o.needs), exact_batch(o, flow)
        assert gradient(o, net, replace(b, progress=1.0)).abs().max() < 1e-12
        assert gradient(o, net, replace(b, progress=0.0)).abs().max() > 1e-3


@pytest.mark.parametrize(("progress", "graded", "still"), [(0.0, 1, 0), (0.5, 1, 1), (1.0, 2, 0)])
def test_passes_follow_the_training_and_nothing_else(progress: float, graded: int, still: int) -> None:
    """Flow matching; a secant; a derivative that rides on the moving rows' share of the pass."""
    o = AlphaFlow(guide=Guide(), slope=DualSlope(), **WIDE)
    b, net = drawn(o, 8, progress=progress), Polynomial(1)
    assert passes(o, b) == (graded, still)
    assert torch.allclose(loss_of(o, net, b).loss, loss_of(o, net, replace(b, moving=None)).loss, rtol=1e-8)


@pytest.mark.parametrize(
    "fields", [{}, {"begin": 0.0, "end": 1.0}, {"begin": 0.0, "end": 0.0}, {"begin": 1.0, "end": 1.0}]
)
def test_phases_are_where_steps_cost_alike(fields: dict[str, float]) -> None:
    """By counting alpha = 1, between and 0 at ten thousand times of the training."""
    objective = AlphaFlow(**fields)

    def phase(progress: float) -> float:
        alpha = objective.alpha(progress)
        return alpha if alpha in (0, 1) else 0.5

    counted = Counter(phase((i + 0.5) / 10_000) for i in range(10_000))
    told = {phase(progress): share for progress, share in objective.phases}
    assert told.keys() == counted.keys()
    assert all(abs(told[key] - count / 10_000) < 2e-4 for key, count in counted.items())
