"""sCT: its formula by hand, its rest at the flow on the circle, its warm-up, its edges and passes."""

from dataclasses import replace
from math import cos, exp, pi, sin, tan

import pytest
import torch
from torch import Tensor, nn

from dumo.flow.path import Trig
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.flow.solver import Restart
from dumo.objectives import SCT
from dumo.testing.exact import APART, D, ExactFlow, ExactNet, exact_batch, gaussian, gradient
from dumo.types import Frozen, Heads, NoisyBatch
from theory.exact import PRODUCT
from theory.formula import Polynomial, agree, changed


class Gauged(nn.Module):
    """A polynomial f, and the gauge a + b t."""

    def __init__(self) -> None:
        super().__init__()
        self.of, self.gauge = Polynomial(1), nn.Parameter(torch.tensor([0.3, -0.8], dtype=D))
        self.weigh = True

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor) -> Heads:
        return *self.of(x, c, t=t), *([self.gauge[0] + self.gauge[1] * t] if self.weigh else [])


def rows(o: SCT, flow: ExactFlow, progress: float, n: int = 64) -> NoisyBatch:
    """A batch of the circle, v_t as it falls."""
    b = replace(exact_batch(o, flow, n), progress=progress)
    x_t, v_t = Trig().at(b.x, b.z, b.t)
    return replace(b, x_t=x_t, v_t=v_t)


GROWN = [(0.0, 0.1, 0.0), (0.04, 0.1, 0.4), (0.5, 0.1, 1.0), (0.0, 0.0, 1.0)]


@pytest.mark.parametrize(("progress", "warmup", "grown"), GROWN)
@pytest.mark.parametrize(("floor", "weigh"), [(0.2, True), (1.0, False)])
def test_formula(progress: float, warmup: float, grown: float, floor: float, weigh: bool) -> None:
    o = changed(SCT, floor=floor)(warmup=warmup, weigh=weigh, slope=JvpSlope())
    net, b = Gauged(), rows(o, gaussian(), progress)
    f, s = net(b.x_t, b.c, t=b.t)
    net.weigh = weigh
    f_theta = net.of.slope(0, b.x_t, b.t, 0 * b.t, b.v_t) * 2 / pi
    losses, sizes = [], []
    for i in range(len(b.t)):
        theta = pi / 2 * b.t[i].item()
        x, z = b.x[i], b.z[i]
        dx = cos(theta) * z - sin(theta) * x
        x_t = cos(theta) * x + sin(theta) * z
        g = -(cos(theta) ** 2) * (f[i] - dx) - grown * cos(theta) * sin(theta) * (x_t + f_theta[i])
        g = g.detach()
        pull = g / ((g**2).mean().sqrt() + floor)
        held = min(max(theta, 1e-4), pi / 2 - 1e-4)
        square = ((f[i] - (f[i].detach() + pull)) ** 2).mean()
        losses.append(square / tan(held) / s[i].exp() + s[i] if weigh else square)
        sizes.append((g**2).mean())
    parts, notes = {"f": torch.stack(sizes)}, {"log_variance": s.detach()} if weigh else {}
    agree(o, net, b, torch.stack(losses), parts, close=1e-10, near=1e-12, **notes)


def taught(flow: ExactFlow, progress: float = 1.0, weigh: bool = True) -> Tensor:
    """The gradient at the exact flow, v_t being its mean."""
    o = SCT(slope=DualSlope(), weigh=weigh)
    return gradient(o, ExactNet(flow, o.needs), replace(exact_batch(o, flow), progress=progress))


@pytest.mark.slow
@pytest.mark.parametrize("flow", [gaussian(), APART, PRODUCT], ids=["gaussian", "apart", "product"])
def test_it_rests_at_the_flow_after_the_warm_up(flow: ExactFlow) -> None:
    """Measured: 3e-15. Before, it is taught something else."""
    assert taught(flow).abs().max() < 1e-12
    assert taught(flow, weigh=False).abs().max() < 1e-12
    assert taught(flow, 0.0).abs().max() > 1e-2


def tangent_head(flow: ExactFlow, x: Tensor, c: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The mean direction of the path, dx_t/dtheta, in place of that to the data."""
    return flow.guided(x, c, t) * 2 / pi


def test_before_the_warm_up_it_is_flow_matching() -> None:
    """It rests where f is the mean of dx_t/dtheta: sCM's stand-in for beginning with a trained diffusion model."""
    o = SCT()
    b = replace(exact_batch(o, APART), progress=0.0)
    assert gradient(o, ExactNet(APART, o.needs, {"f": tangent_head}), b).abs().max() < 1e-12


def test_the_gauge_settles_at_the_log_of_what_it_divides() -> None:
    """d/ds of exp(-s) L + s is 0 where exp(s) = L: then every time weighs the same."""
    o = SCT(slope=JvpSlope())
    net, b = Gauged(), rows(o, gaussian(), 1.0)
    net.gauge.data = torch.zeros(2, dtype=D)
    pull = o.loss(net, Frozen(net), b).loss.detach()  # s = 0
    net.gauge.data = torch.stack([pull.mean().log(), torch.zeros((), dtype=D)])
    (slope,) = torch.autograd.grad(o.loss(net, Frozen(net), b).loss.mean(), [net.gauge])
    assert abs(slope[0].item()) < 1e-12
    net.gauge.data[0] += 1
    (slope,) = torch.autograd.grad(o.loss(net, Frozen(net), b).loss.mean(), [net.gauge])
    assert abs(slope[0].item() - (1 - exp(-1))) < 1e-9


def test_the_circle_leads_to_the_data() -> None:
    """From any time, and by two jumps with fresh noise between: samples of the data's width."""
    o, flow = SCT(), gaussian()
    readings = o.readings(ExactNet(flow, o.needs))
    assert readings.velocity is None
    n, g = 20_000, torch.Generator().manual_seed(0)
    z, again = torch.randn(2, n, 2, generator=g, dtype=D)
    c = torch.arange(n) % 3
    made = Restart(m=0.652)(readings, Trig(), z, c, 2, lambda _: again)
    assert torch.allclose(torch.stack([made[c == k].std() for k in range(3)]), flow.std[:3], rtol=0.02)
