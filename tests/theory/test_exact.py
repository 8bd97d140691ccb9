"""The flows and nets that objectives are held against are what they say, each checked by another way than its own."""

from math import pi, sqrt

import pytest
import torch
from torch import Tensor

from dumo.flow.guide import Guide, Interval
from dumo.flow.path import Linear
from dumo.objectives import MeanFlow
from dumo.testing.exact import APART, D, ExactFlow, ExactNet, Gaussian, column, gaussian, mean_velocity_head, table
from theory.exact import PRODUCT, Mixture, Product, integrate, plane
from theory.formula import Polynomial, rows

GUIDE = Guide(omega=0.2, zeta=0.92, interval=Interval(low=0.1, high=0.75))


def points(flow: ExactFlow, n: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Places where the flow has mass, conditions and pairs of times."""
    g = torch.Generator().manual_seed(1)
    c = torch.arange(n) % (flow.classes + 1)
    t, r = torch.rand(2, n, generator=g, dtype=D)
    x = flow.data(c, g)
    return column(1 - t) * x + column(t) * torch.randn(x.shape, generator=g, dtype=D), c, t, r


def test_velocity_is_the_mean_slope_by_quadrature() -> None:
    """E[v_t | x_t] = integral of (x_t - x) / t over the posterior of x, of two components at four times."""
    weight, mean, std = table([0.3, 0.7], [0.5, 0.5]), table([-1.0], [0.4]), table([0.3], [0.5])
    x = torch.linspace(-6, 6, 20_001, dtype=D)
    prior = (weight[0, :, None] * (-(((x - mean) / std) ** 2) / 2).exp() / std).sum(0)
    for t in (0.1, 0.4, 0.8, 1.0):
        at = torch.tensor([-1.3, 0.2, 0.9], dtype=D)
        posterior = prior * (-(((at[:, None] - (1 - t) * x) / t) ** 2) / 2).exp()
        slope = (posterior * (at[:, None] - x) / t).sum(1) / posterior.sum(1)
        v = Mixture(weight, mean, std).velocity(
            at[:, None], torch.zeros(3, dtype=torch.long), torch.full((3,), t, dtype=D)
        )
        assert (v[:, 0] - slope).abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("flow", [APART, plane()])
def test_velocity_is_the_mean_of_the_paths_slopes(flow: ExactFlow) -> None:
    """Of the slopes that training sees, by their moments with 1, x_t and x_t^2: 400,000 draws, where a sign is 1."""
    g = torch.Generator().manual_seed(2)
    c = torch.zeros(400_000, dtype=torch.long)
    x = flow.data(c, g)
    for now in (0.1, 0.5, 0.9):
        t = torch.full((len(c),), now, dtype=D)
        x_t, v_t = Linear().at(x, torch.randn(x.shape, generator=g, dtype=D), t)
        off = v_t - flow.velocity(x_t, c, t)
        assert torch.stack([(off * x_t**k).mean(0) for k in range(3)]).abs().max() < 0.02
        assert off.std() > 0.3


def test_a_mixture_of_one_is_a_gaussian() -> None:
    one = Mixture(table([1.0], [1.0]), table([0.5, 0.5]), table([0.4, 0.4]))
    both = table([0.4, 0.4])[0], table([0.5, 0.5])[0]
    x, c, t, r = points(one)
    assert torch.allclose(one.velocity(x, c, t), Gaussian(*both).velocity(x, c, t), rtol=0, atol=1e-13)
    assert torch.allclose(one.carry(x, c, t, r), Gaussian(*both).carry(x, c, t, r), rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("flow", [gaussian(GUIDE), gaussian(Guide(zeta=0.55)), APART, PRODUCT])
def test_closed_flows_follow_their_velocity(flow: ExactFlow) -> None:
    """Closed forms and quantiles against Runge and Kutta, piece by piece: the guide's corners cost order."""
    x, c, t, r = points(flow)
    for low, high in ((0.0, 0.1), (0.1, 0.75), (0.75, 1.0)):
        a, b = (s.clamp(low, high) for s in (t, r))
        inside = (low + 1e-12, high - 1e-12)
        walked = integrate(lambda x, s, inside=inside: flow.guided(x, c, s.clamp(*inside)), x, a, b)
        assert (flow.carry(x, c, a, b) - walked).abs().max() < 1e-10


@pytest.mark.parametrize("flow", [gaussian(GUIDE), APART, PRODUCT, plane(Guide(zeta=0.55))])
def test_flows_compose(flow: ExactFlow) -> None:
    x, c, t, r = points(flow)
    s = (t + r) / 2
    whole, halves = flow.carry(x, c, t, r), flow.carry(flow.carry(x, c, t, s), c, s, r)
    assert (whole - halves).abs().max() < 1e-9
    assert (flow.carry(x, c, t, t) - x).abs().max() < 1e-12


@pytest.mark.parametrize("flow", [gaussian(GUIDE), plane(Guide(zeta=0.55))])
def test_null_rows_are_unguided(flow: ExactFlow) -> None:
    x, _, t, _ = points(flow)
    null = torch.full((len(x),), flow.classes)
    assert (flow.guided(x, null, t) - flow.velocity(x, null, t)).abs().max() < 1e-12


def test_quantiles_keep_the_shares() -> None:
    """The noise at its median goes to the median, at one sigma to 84 %: for a two-humped law, in each coordinate."""
    c, one = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=D)
    noise = table([0.0, 0.0], [1.0, 1.0], [-2.0, -2.0])
    data = PRODUCT.carry(noise, c, one, 0 * one)
    share = (torch.erf(noise / sqrt(2)) / 2).flatten()
    grid = torch.linspace(-8, 8, 200_001, dtype=D)
    for i in range(2):
        bell = (-(((grid - PRODUCT.mean[:, i, None]) / PRODUCT.std[:, i, None]) ** 2) / 2).exp() / PRODUCT.std[
            :, i, None
        ]
        law = (PRODUCT.weight[0][:, None] * bell).sum(0) / sqrt(2 * pi)
        for k in range(3):
            reached = law[grid < data[k, i]].sum() * 16 / 200_000
            assert abs(reached - 0.5 - share[2 * k]) < 1e-4


def test_data_have_the_laws_moments() -> None:
    for flow in (APART, PRODUCT, plane()):
        c = torch.zeros(200_000, dtype=torch.long)
        x = flow.data(c, torch.Generator().manual_seed(3))
        if isinstance(flow, Gaussian):
            mean, var = flow.mean[0].expand(2), flow.std[0].square().expand(2)
        else:
            assert isinstance(flow, Mixture)
            share = flow.weight[0][:, None]
            mean = (share * flow.mean).sum(0)
            var = (share * (flow.std**2 + flow.mean**2)).sum(0) - mean**2
        assert (x.mean(0) - mean).abs().max() < 0.01
        assert (x.var(0) - var).abs().max() < 0.01
        together = ((x - x.mean(0)).prod(1)).mean()  # coordinates of a product are independent
        assert (isinstance(flow, Mixture) and not isinstance(flow, Product)) or together.abs() < 0.01


def test_probes_move_each_head_alone() -> None:
    net = ExactNet(APART, MeanFlow().needs)
    x, c, t, r = points(APART)
    (before,) = net(x, c, t=t, r=r)
    net.probe.data[0] = table([0.1, 0.2])[0]
    (after,) = net(x, c, t=t, r=r)
    assert torch.allclose(after - before, 0.1 + 0.2 * x, rtol=0, atol=1e-12)
    assert torch.equal(mean_velocity_head(APART, x, c, t, t), APART.guided(x, c, t))


def test_polynomial_slopes_are_right() -> None:
    """By central differences, so that the hand has been checked too."""
    net, b = Polynomial(1), rows(MeanFlow())
    h, w = 1e-5, table([0.3, -0.7])
    ahead, behind = (net(b.x_t + s * w, b.c, t=b.t + s, r=b.r)[0] for s in (h, -h))
    assert ((ahead - behind) / (2 * h) - net.slope(0, b.x_t, b.t, b.r, w)).abs().max() < 1e-8
