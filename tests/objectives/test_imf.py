"""Improved MeanFlow: its formula by hand, its rest at the flow that its knobs ask for, its passes."""

from dataclasses import replace
from itertools import pairwise
from math import log

import pytest
import torch
from torch import Tensor, nn

from contract.case import passes
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.flow.times import Pair
from dumo.objectives import ImprovedMeanFlow
from dumo.types import Frozen, Heads, Noised
from theory.exact import APART, PRODUCT, D, Exact, Flow, column, gaussian, gradient, plane, record
from theory.formula import Polynomial, changed, gradients, half, rows

EVEN = Pair(velocity_ratio=0.5)


class Knobbed(nn.Module):
    """Two polynomials, u and v, to each of which every knob adds its own multiple of knob x."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Polynomial(2)
        self.k = nn.Parameter(torch.randn(2, 3, generator=torch.Generator().manual_seed(4), dtype=D))

    def told(self, knobs: dict[str, Tensor]) -> Tensor:
        """(2, b): the multiples of x."""
        return self.k @ torch.stack([knobs["w"], knobs["low"], knobs["high"]]) if knobs else 0 * self.k[:, :1]

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor, **knobs: Tensor) -> Heads:
        return tuple(y + column(k) * x for y, k in zip(self.of(x, c, t=t, r=r), self.told(knobs), strict=True))

    def slope(self, x: Tensor, t: Tensor, r: Tensor, w: Tensor, knobs: dict[str, Tensor]) -> Tensor:
        """du/dt along w."""
        return self.of.slope(0, x, t, r, w) + column(self.told(knobs)[0].detach()) * w


def by_hand(o: ImprovedMeanFlow, net: Knobbed, b: Noised) -> tuple[Tensor, Tensor]:
    """The errors of u and of v, row by row."""
    w, low, high, scale = (torch.ones_like(b.t) for _ in range(4))
    for i in range(len(b.t)) if o.w else ():
        resting = bool(b.r[i] == b.t[i])
        low[i], high[i] = (0, 1) if resting else (b.drawn["low"][i], b.drawn["high"][i])
        w[i] = o.w ** b.drawn["w"][i]
        scale[i] = w[i] if resting or low[i] <= b.t[i] <= high[i] else 1
    whole = {"low": torch.zeros_like(b.t), "high": torch.ones_like(b.t)}
    told = {"w": w, "low": low, "high": high}, {"w": scale, **whole}, {"w": torch.ones_like(b.t), **whole}
    given, at, null = told if o.w else ({}, {}, {})
    v = net(b.x_t, b.c, t=b.t, r=b.t, **at)[1].detach()
    v_null = net(b.x_t, b.null, t=b.t, r=b.t, **null)[1].detach()
    v_star = b.v_t.clone()
    for i in range(len(b.t)):
        if o.w and b.kept[i]:
            v_star[i] += (1 - 1 / scale[i]) * (v[i] - v_null[i])
    u_hat, v_hat = net(b.x_t, b.c, t=b.t, r=b.r, **given)
    u_star = v_star - column(b.t - b.r) * net.slope(b.x_t, b.t, b.r, v, given)
    return u_hat - u_star, v_hat - v_star


@pytest.mark.parametrize("w", [8.0, None], ids=["guided", "unguided"])
@pytest.mark.parametrize(("power", "floor"), [(1.0, 0.01), (0.0, 0.01), (0.75, 1e-3)])
def test_formula(w: float | None, power: float, floor: float) -> None:
    o = changed(ImprovedMeanFlow, power=power, floor=floor)(w=w, drop=0.3, times=EVEN, slope=JvpSlope())
    net, b = Knobbed(), rows(o)
    assert (b.r == b.t).any()
    assert (b.r < b.t).any()
    u_error, v_error = by_hand(o, net, b)
    sizes = [(e**2).sum(1) for e in (u_error, v_error)]
    loss = sum(s / (s + floor).detach() ** power for s in sizes)
    found = o.loss(net, Frozen(net), b)
    assert torch.allclose(found.loss, loss, rtol=1e-12, atol=0)
    assert torch.allclose(found.parts["u"], sizes[0] / 2, rtol=1e-12, atol=0)
    assert torch.allclose(found.parts["v"], sizes[1] / 2, rtol=1e-12, atol=0)
    assert torch.allclose(found.notes["clipped_share"].double(), half(u_error))
    for mine, hand in zip(gradients(found.loss, net), gradients(loss, net), strict=True):
        assert (mine is None) == (hand is None)  # knobs that are not there
        assert mine is None or torch.allclose(mine, hand, rtol=1e-10, atol=1e-12)


def at_rest(o: ImprovedMeanFlow, flow: Flow, n: int = 256, **drawn: float) -> float:
    b = record(o, flow, n)
    b = replace(b, drawn={**b.drawn, **{name: torch.full_like(b.t, value) for name, value in drawn.items()}})
    return gradient(o, Exact(flow, o.needs), b).abs().max().item()


@pytest.mark.parametrize("slope", [JvpSlope(), DualSlope()], ids=lambda s: s.kind)
def test_it_rests_at_the_flow_that_its_knobs_ask_for(slope: Slope) -> None:
    """Every row guided by its own w in its own interval. Measured: 4e-15 on Gaussians, 4e-13 by Runge and Kutta."""
    o = ImprovedMeanFlow(times=EVEN, drop=0.2, slope=slope)
    assert at_rest(o, gaussian()) < 1e-12
    assert at_rest(o.model_copy(update={"drop": 1.0}), gaussian()) < 1e-12  # no label: w moves nothing
    assert at_rest(o, plane(), 64, low=-1.0, high=2.0) < 1e-10  # guided at all times, as a mixture has it
    for flow in (APART, PRODUCT):
        assert at_rest(o.model_copy(update={"w": None}), flow) < 1e-12


def test_another_scale_is_not_at_rest() -> None:
    o = ImprovedMeanFlow(times=EVEN, drop=0.2)
    b = record(o, gaussian())
    other = replace(b, drawn={**b.drawn, "w": b.drawn["w"] + log(1.2) / log(8)})  # w is 1.2 times as large
    told = Exact(gaussian(), o.needs)
    assert gradient(o, told, other).abs().max() < 1e-12  # told of it, it is

    class Deaf(Exact):
        def forward(self, x: Tensor, c: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
            return super().forward(x, c, **inputs | {"w": inputs["w"] / 1.2})

    assert gradient(o, Deaf(gaussian(), o.needs), other).abs().max() > 1e-2


@pytest.mark.parametrize("guided", [True, False])
def test_differences_are_of_second_order(guided: bool) -> None:
    """Away from the ends of the interval, where the guided velocity jumps, and with it d/dt of u."""
    o = changed(ImprovedMeanFlow, power=0.0)(times=EVEN, drop=0.2)
    o, flow = (o, gaussian()) if guided else (o.model_copy(update={"w": None}), PRODUCT)
    b = record(o, flow)
    if guided:
        clear = (b.t - b.drawn["low"]).abs().minimum((b.t - b.drawn["high"]).abs()) > 0.05
        b = b[clear.nonzero().flatten()]
    left = [
        gradient(o.model_copy(update={"slope": CentralSlope(h=h)}), Exact(flow, o.needs), b)[0].norm()
        for h in (0.02, 0.01, 0.005, 0.0025)
    ]
    for coarse, fine in pairwise(left):
        assert abs((coarse / fine).log2() - 2) < 0.15


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_rows_without_a_step_are_flow_matching_for_both_heads(power: float) -> None:
    """A gradient D / (S + floor)^power times that of the mean square, for D numbers in a row."""
    o = changed(ImprovedMeanFlow, power=power)(w=None, times=Pair(velocity_ratio=1.0), slope=DualSlope())
    net, b = Knobbed(), rows(o)
    b = replace(b.at(b.t), r=b.t)[5:]
    v_t = b.v_t
    for i in range(4):
        row = b[i : i + 1]
        u, v = net(row.x_t, row.c, t=row.t, r=row.t)
        flow = [((head - v_t[i]) ** 2).sum(1) / 2 for head in (u, v)]
        factors = [2 / (2 * f.item() + o.floor) ** power for f in flow]
        hand = sum(k * f for k, f in zip(factors, flow, strict=True))
        mine = gradients(o.loss(net, Frozen(net), row).loss, net)
        for one, other in zip(mine, gradients(hand, net), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-9, atol=1e-12)


COUNTS = [  # passes with gradients, and without
    (ImprovedMeanFlow(slope=DualSlope()), 2, 2),  # a ride of the rows with r < t, and the others; V and V(null)
    (ImprovedMeanFlow(slope=JvpSlope()), 1, 3),
    (ImprovedMeanFlow(slope=CentralSlope()), 1, 4),
    (ImprovedMeanFlow(slope=DualSlope(), w=None), 2, 1),  # V alone
    (ImprovedMeanFlow(slope=JvpSlope(), w=None), 1, 2),
]


@pytest.mark.parametrize(("o", "graded", "still"), COUNTS)
def test_passes(o: ImprovedMeanFlow, graded: int, still: int) -> None:
    assert passes(o) == (graded, still)


def test_knobs_are_there_where_guidance_is() -> None:
    assert list(ImprovedMeanFlow().needs.knobs) == ["w", "low", "high"]
    assert ImprovedMeanFlow(w=None).needs.knobs == {}
    assert "w" not in rows(ImprovedMeanFlow(w=None)).drawn


def test_no_scale_up_to_1_is_guidance() -> None:
    with pytest.raises(ValueError, match="greater than 1"):
        ImprovedMeanFlow(w=1.0)
