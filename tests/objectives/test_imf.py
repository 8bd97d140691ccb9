"""Improved MeanFlow: its formula by hand, its rest at the flow that its knobs ask for, its passes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.slope import DualSlope, JvpSlope
from dumo.flow.times import Pair
from dumo.objectives import ImprovedMeanFlow
from dumo.testing.exact import APART, D, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient
from dumo.types import Heads, NoisyBatch
from theory.exact import PRODUCT, plane
from theory.formula import Polynomial, agree, changed, half, rows

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


def by_hand(o: ImprovedMeanFlow, net: Knobbed, b: NoisyBatch) -> tuple[Tensor, Tensor]:
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
    parts = {"u": sizes[0] / 2, "v": sizes[1] / 2}
    agree(o, net, b, loss, parts, clipped_share=half(u_error))


def at_rest(o: ImprovedMeanFlow, flow: ExactFlow, n: int = 256, **drawn: float) -> float:
    b = exact_batch(o, flow, n)
    b = replace(b, drawn={**b.drawn, **{name: torch.full_like(b.t, value) for name, value in drawn.items()}})
    return gradient(o, ExactNet(flow, o.needs), b).abs().max().item()


@pytest.mark.slow
def test_it_rests_at_the_flow_that_its_knobs_ask_for() -> None:
    """Every row guided by its own w in its own interval. Measured: 4e-15 on Gaussians, 4e-13 by Runge and Kutta."""
    o = ImprovedMeanFlow(times=EVEN, drop=0.2, slope=DualSlope())
    assert at_rest(o, gaussian()) < 1e-12
    assert at_rest(o.model_copy(update={"drop": 1.0}), gaussian()) < 1e-12  # no label: w moves nothing
    assert at_rest(o, plane(), 64, low=-1.0, high=2.0) < 1e-10  # guided at all times, as a mixture has it
    for flow in (APART, PRODUCT):
        assert at_rest(o.model_copy(update={"w": None}), flow) < 1e-12


def test_knobs_are_there_where_guidance_is() -> None:
    assert list(ImprovedMeanFlow().needs.knobs) == ["w", "low", "high"]
    assert ImprovedMeanFlow(w=None).needs.knobs == {}
    assert "w" not in rows(ImprovedMeanFlow(w=None)).drawn
