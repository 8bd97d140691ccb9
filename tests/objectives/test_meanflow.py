"""MeanFlow: its loss against its formula, written out by hand, its limits, and its defaults against the paper."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from dumo.flow.guide import Guide
from dumo.flow.slope import DualSlope
from dumo.flow.times import Jumps, Pair
from dumo.objectives import MeanFlow
from dumo.objectives.meanflow import Line
from dumo.testing.exact import APART, ExactFlow, ExactNet, column, exact_batch, gradient
from dumo.testing.properties import loss_of
from theory.exact import PRODUCT, drawn
from theory.formula import GUIDES, Polynomial, agree, guided, half, rows


@pytest.mark.parametrize(
    ("guide", "power", "floor"), [(g, p, c) for g in GUIDES for p, c in ((0.0, 0.01), (1.0, 0.01), (0.75, 1e-3))]
)
def test_formula(guide: Guide, power: float, floor: float) -> None:
    objective = MeanFlow(guide=guide, power=power, floor=floor, drop=0.3, times=Pair(velocity_ratio=0.5))
    net, b = Polynomial(1), rows(objective)
    (u,), (v_c,), (v_null,) = (net(b.x_t, c, t=b.t, r=r) for c, r in ((b.c, b.r), (b.c, b.t), (b.null, b.t)))
    v_star = guided(b, guide, v_c, v_null)
    u_star = v_star - column(b.t - b.r) * net.slope(0, b.x_t, b.t, b.r, v_star)
    total = ((u - u_star) ** 2).sum(1)
    loss = total / (total + floor).detach() ** power
    agree(objective, net, b, loss, {"u": total / 2}, clipped_share=half(u - u_star))


def test_formula_of_ayf() -> None:
    """A derivative that has grown to a share, and a pull by e / (rms(e) + c)."""
    grown = Line(first=0.2, last=0.8, over=0.5)
    objective = MeanFlow(guide=Guide(), power=0, normalize=0.1, grown=grown, times=Pair(velocity_ratio=0))
    for progress, k in ((0.0, 0.2), (0.25, 0.5), (1.0, 0.8)):
        net, b = Polynomial(1), replace(rows(objective), progress=progress)
        (u,) = net(b.x_t, b.c, t=b.t, r=b.r)
        e = u - (b.v_t - k * column(b.t - b.r) * net.slope(0, b.x_t, b.t, b.r, b.v_t))
        s = (e**2).mean(1)
        agree(objective, net, b, s / (s.sqrt() + 0.1).detach(), {"u": s}, clipped_share=half(e))
        found = loss_of(objective, net, b).loss.sum()
        (u,) = net(b.x_t, b.c, t=b.t, r=b.r)
        pulled = ((u - (u - e / (s.sqrt() + 0.1)[:, None]).detach()) ** 2).mean(1).sum()
        for mine, theirs in zip(*(torch.autograd.grad(y, net.a) for y in (found, pulled)), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-11, atol=0)


@pytest.mark.parametrize("k", [1.0, 0.99])
def test_ayf_rests_at_the_flow_of_its_teacher(k: float) -> None:
    """Whose velocity the batch has; with k below 1 that is only nearly so: it is of the size of 1 - k."""
    objective = MeanFlow(
        guide=Guide(),
        power=0,
        normalize=0.1,
        grown=Line(first=k, last=k),
        slope=DualSlope(),
        times=Pair(velocity_ratio=0),
    )
    left = gradient(objective, ExactNet(APART, objective.needs), exact_batch(objective, APART)).abs().max()
    assert left < 1e-12 if k == 1 else 1e-4 < left < 0.2


def test_ayf_fields_are_not_written_where_they_are_off() -> None:
    assert not MeanFlow().model_dump().keys() & {"normalize", "grown"}
    with pytest.raises(ValidationError, match="power=0"):
        MeanFlow(normalize=0.1, power=1)


@pytest.mark.parametrize(("power", "rests"), [(0.0, True), (1.0, False)])
def test_the_adaptive_metric_shifts_the_rest_where_slopes_are_skewed(power: float, rests: bool) -> None:
    """MeanFlow's own limit (its Eq. 22): small residuals weigh more, so it seeks not the mean slope but one nearer to
    the mode. Slopes of +2 with probability 1/3 and of -1 with 2/3 about the mean show it; p = 0 rests at the mean."""
    o = MeanFlow(power=power, guide=Guide(), times=Pair(velocity_ratio=0.5))
    net, b = ExactNet(APART, o.needs), exact_batch(o, APART)
    high, low = (gradient(o, net, replace(b, v_t=b.v_t + off)) for off in (2, -1))
    assert high.abs().max() > 0.1
    assert bool((high / 3 + 2 * low / 3).abs().max() < 1e-12) == rests


@pytest.mark.parametrize("flow", [APART, PRODUCT], ids=["gaussian", "mixture"])
def test_with_jumps_both_ways_it_rests_at_the_flow_and_reads_the_way_back(flow: ExactFlow) -> None:
    """From data to noise and to the same data, as BiFM."""
    objective = MeanFlow(times=Jumps(both_ways=True), guide=Guide(), slope=DualSlope(), drop=0.0)
    net, b = ExactNet(flow, objective.needs), drawn(objective, 128, flow, teacher=True)
    assert (b.r > b.t).sum() > 20
    assert gradient(objective, net, b).abs().max() < 1e-10
    jump = objective.readings(net).flow_map
    assert jump is not None
    zero, one = 0 * b.t, 0 * b.t + 1
    with torch.no_grad():
        noise = jump(b.x, zero, one, b.c)
        assert torch.allclose(noise, flow.carry(b.x, b.c, zero, one), rtol=1e-9)
        assert torch.allclose(jump(noise, one, zero, b.c), b.x, rtol=1e-9)
    net.probe.data[0, 0] = 0.1
    assert gradient(objective, net, b).abs().max() > 1e-3
