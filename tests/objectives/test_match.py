"""Match: the formula by hand, DuMo within it, its rest at the flow, which way it moves samples, and what it costs."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch

from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets.dit import DiT
from dumo.objectives import DuMo
from dumo.objectives.match import HEAD_WEIGHT, WEIGHT, Match, sid_loss
from dumo.run.flops import forward_units
from dumo.testing.exact import D, ExactNet, Gaussian, column, exact_batch, gaussian, gradient, growth
from dumo.testing.properties import loss_of
from dumo.types import Frozen
from theory.exact import PRODUCT, Product, drawn
from theory.formula import Polynomial, passes
from theory.pulled import added, adds, moves_samples_back, width_gradient

MATCH, SID = (Match(alpha=alpha, slope=JvpSlope(), drop=0.3) for alpha in (None, 1.2))


@pytest.mark.parametrize("progress", [0.3, 0.5, 1.0])
def test_by_hand(progress: float) -> None:
    net, b = Polynomial(3), drawn(MATCH, 16, progress=progress)
    none, z, t = 0 * b.t, b.drawn["w.z"].to(D), b.drawn["w.t"].to(D)
    u = net(b.z, b.c, t=none + 1)[1]
    made = (b.z - u).detach()
    v, _, w = net(column(t) * z + column(1 - t) * made, b.c, t=t)
    gap, fit = (w - v).detach(), ((w - z + made) ** 2).sum(1) / 2
    pull = ((u - u.detach() + gap) ** 2).sum(1) / 2
    loss = HEAD_WEIGHT * fit + (WEIGHT * pull if progress >= 0.5 else 0)
    terms = loss_of(MATCH, net, b)
    assert torch.allclose(terms.parts["w"], fit, rtol=1e-12, atol=0)
    assert torch.allclose(terms.notes["pull_w"], (gap**2).sum(1) / 2, rtol=1e-12, atol=0)
    adds(MATCH, net, b, loss)


def test_by_identity_by_hand() -> None:
    """Samples see how w and v change along them, and no weight but that of u learns it."""
    net, b = Polynomial(3), drawn(SID, 16, progress=1.0)
    still = deepcopy(net).requires_grad_(False)
    z, t = b.drawn["w.z"].to(D), b.drawn["w.t"].to(D)
    made = b.z - net(b.z, b.c, t=0 * b.t + 1)[1]
    x_t = column(t) * z + column(1 - t) * made
    v, _, w = still(x_t, b.c, t=t)
    fit = ((net(x_t.detach(), b.c, t=t)[2] - z + made.detach()) ** 2).sum(1) / 2
    product = ((w - v) * (z - made - v) - 1.2 * (w - v) ** 2).sum(1) / 2
    distance = (column(t) * (z - made - v)).abs().sum(1).detach() / 2
    loss = HEAD_WEIGHT * fit + WEIGHT * t**2 * product / distance
    terms = loss_of(SID, net, b)
    assert torch.allclose(terms.notes["pull_w"], ((w - v) ** 2).sum(1) / 2, rtol=1e-12, atol=0)
    adds(SID, net, b, HEAD_WEIGHT * fit, moved_as=loss, near=1e-12)


@pytest.mark.parametrize(("alpha", "exact"), [(0.5, True), (1.2, False)])
def test_half_of_the_identity_is_the_slope_of_the_divergence(alpha: float, exact: bool) -> None:
    """Gaussian samples of any width; means over both noises, of which +-1 have the moments that matter."""
    s = torch.tensor(1.7, dtype=D, requires_grad=True)
    x, z = torch.tensor(list(product((1, -1), repeat=2)), dtype=D).T[:, :, None]
    for t in torch.tensor([0.2, 0.5, 0.9], dtype=D):
        x_t, v_of, w_of = t * z + (1 - t) * s * x, growth(torch.tensor(0.6, dtype=D), t), growth(s, t)
        (slope,) = torch.autograd.grad(((w_of - v_of) * x_t).square().mean(), s, retain_graph=True)
        loss = sid_loss(w_of.detach() * x_t, v_of * x_t, z - s * x, alpha).mean()
        (found,) = torch.autograd.grad(loss, s)
        assert torch.isclose(2 * found, slope, rtol=1e-12) == exact


def test_the_rest_is_dumo_to_the_bit() -> None:
    net, b = Polynomial(3), drawn(MATCH, 16, progress=1.0)
    first = Polynomial(3)
    first.forward = lambda x, c, /, **at: net(x, c, **at)[:2]  # pyright: ignore[reportAttributeAccessIssue]
    dumo = DuMo(guide=Guide(), slope=JvpSlope()).loss(first, Frozen(first), b)
    mine = MATCH.loss(net, Frozen(net), b)
    assert all(torch.equal(mine.parts[name], dumo.parts[name]) for name in ("v", "u"))
    assert torch.allclose(added(MATCH, net, b) + dumo.loss, mine.loss, rtol=1e-14)


@pytest.mark.parametrize("flow", [gaussian(), PRODUCT])
@pytest.mark.parametrize("objective", [MATCH, SID], ids=["DMD2", "SiD"])
def test_it_rests_at_the_flow(flow: Gaussian | Product, objective: Match) -> None:
    """Row by row for v and u; for w on average only, which is the next test's."""
    b = exact_batch(objective, flow, 64)
    assert gradient(objective, ExactNet(flow, objective.needs), b)[:2].abs().max() < 1e-10


def test_the_head_of_samples_rests_at_the_flow() -> None:
    """The mean over noise, exactly: the gradient is of second order in both noises, of which +-1 have the moments."""
    four = torch.tensor(list(product((1, -1), repeat=2)), dtype=D)
    z, z_own = (column(a).expand(4, 2) for a in four.T)
    b = drawn(MATCH, 4, progress=1.0)
    for t in (0.0, 0.3, 1.0):
        at = replace(b, z=z, c=0 * b.c, drawn={"w.z": z_own, "w.t": torch.full_like(b.t, t)})
        net = ExactNet(gaussian(), MATCH.needs)
        (left,) = torch.autograd.grad(loss_of(MATCH, net, at).parts["w"].mean(), net.probe)
        assert left.abs().max() < 1e-12
        same = replace(at, drawn={**at.drawn, "w.z": z})
        (left,) = torch.autograd.grad(loss_of(MATCH, net, same).parts["w"].mean(), net.probe)
        assert left.abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_samples_of_another_width_are_moved_back(alpha: float | None) -> None:
    objective = Match(alpha=alpha, drop=0.0, slope=JvpSlope())
    assert moves_samples_back(objective, WEIGHT)
    assert abs(width_gradient(objective, 1.0)) < 1e-12


@pytest.mark.parametrize(("objective", "before", "now"), [(MATCH, (2, 1), (3, 0)), (SID, (2, 1), (4, 0))])
def test_number_of_passes(objective: Match, before: tuple[int, int], now: tuple[int, int]) -> None:
    """One for the samples, with gradients only where they are moved, and one for w; of SiD another."""
    objective = objective.model_copy(update={"slope": DualSlope()})
    for progress, count in ((0.0, before), (0.7, now)):
        assert passes(objective, drawn(objective, 16, progress=progress)) == count


@pytest.mark.nightly
def test_cost() -> None:
    """4 F before, 6 F from half of the training on, beside DuMo: the mean of both halves."""
    spec, shape = DiT(width=32, depth=2, patch=2, attention=2), (1, 8, 8)
    objectives = Match(slope=DualSlope()), DuMo(slope=DualSlope(), guide=Guide())
    mine, dumo = (forward_units(spec.build(o.needs, shape, 3), o, Linear(), shape) for o in objectives)
    assert objectives[0].needs.phases == ((0.0, 0.5), (0.5, 0.5))
    assert mine - dumo == pytest.approx(5, rel=0.06)
