"""Match: the formula by hand, DuMo within it, its rest at the flow, which way it moves samples, and what it costs."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn

from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets.dit import DiT
from dumo.objectives import DuMo
from dumo.objectives.dmd2 import FLOOR, HUBER, sid_loss
from dumo.objectives.match import HEAD_WEIGHT, WEIGHT, Match
from dumo.run.flops import forward_units
from dumo.testing.exact import D, ExactNet, Gaussian, column, exact_batch, gaussian, gradient, growth
from dumo.testing.properties import loss_of
from dumo.types import Frozen, Heads, NoisyBatch
from theory.exact import PRODUCT, Product, drawn
from theory.formula import Polynomial, passes
from theory.pulled import added, adds, moves_samples_back, width_gradient

MATCH, SID = (Match(alpha=alpha, slope=JvpSlope(), drop=0.3) for alpha in (None, 1.2))
SIM = Match(alpha=1.0, normalize="huber", slope=JvpSlope(), drop=0.3)
DIFF_INSTRUCT = Match(normalize="none", slope=JvpSlope(), drop=0.3)
ALL = pytest.mark.parametrize(
    "objective", [MATCH, SID, SIM, DIFF_INSTRUCT], ids=["DMD2", "SiD", "SIM", "Diff-Instruct"]
)


def divisor(objective: Match, gap: Tensor, error: Tensor) -> Tensor:
    """What V is divided by in each row of two numbers."""
    if objective.normalize == "none":
        return torch.ones(len(gap), 1, dtype=D)
    size = error.abs() if objective.normalize == "distance" else gap**2
    mean = (size[:, :1] + size[:, 1:]) / 2
    return mean.detach().clamp(min=FLOOR) if objective.normalize == "distance" else (mean + HUBER**2) ** 0.5


@pytest.mark.parametrize("objective", [MATCH, DIFF_INSTRUCT], ids=["DMD2", "Diff-Instruct"])
@pytest.mark.parametrize("progress", [0.3, 0.5, 1.0])
def test_by_hand(progress: float, objective: Match) -> None:
    net, b = Polynomial(3), drawn(objective, 16, progress=progress)
    none, z, t = 0 * b.t, b.drawn["w.z"].to(D), b.drawn["w.t"].to(D)
    u = net(b.z, b.c, t=none + 1)[1]
    made = (b.z - u).detach()
    v, _, w = net(column(t) * z + column(1 - t) * made, b.c, t=t)
    gap, fit = (w - v).detach(), ((w - z + made) ** 2).sum(1) / 2
    move = gap / divisor(objective, gap, (z - made - v).detach())
    pull = ((u - u.detach() + move) ** 2).sum(1) / 2
    loss = HEAD_WEIGHT * fit + (WEIGHT * pull if progress >= 0.5 else 0)
    terms = loss_of(objective, net, b)
    assert torch.allclose(terms.parts["w"], fit, rtol=1e-12, atol=0)
    assert torch.allclose(terms.notes["pull_w"], (gap**2).sum(1) / 2, rtol=1e-12, atol=0)
    adds(objective, net, b, loss)


def test_a_row_without_distance_does_not_divide_by_zero() -> None:
    """Where v is z' - x', V is divided by the floor."""
    net, b = Polynomial(3), drawn(MATCH, 16, progress=1.0)
    t, z = b.drawn["w.t"].to(D), b.drawn["w.z"].to(D)

    def knowing(x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        """v as it is in (2), at the points of the loss; w is off by 1."""
        v, u, w = net(x, c, **inputs)
        made = (b.z - net(b.z, c, t=0 * b.t + 1)[1]).detach()
        right = torch.equal(x, column(t) * z + column(1 - t) * made)
        return (z - made, u, z - made + 1) if right else (v, u, w)

    u = net(b.z, b.c, t=0 * b.t + 1)[1]
    terms = MATCH.pull(knowing, b, u)
    assert torch.allclose(terms.loss, torch.full_like(terms.loss, HEAD_WEIGHT + WEIGHT / FLOOR**2), rtol=1e-9)


@pytest.mark.parametrize("objective", [SID, SIM], ids=["SiD", "SIM"])
def test_by_identity_by_hand(objective: Match) -> None:
    """Samples see how w and v change along them, and no weight but that of u learns it."""
    net, b = Polynomial(3), drawn(objective, 16, progress=1.0)
    still = deepcopy(net).requires_grad_(False)
    z, t = b.drawn["w.z"].to(D), b.drawn["w.t"].to(D)
    made = b.z - net(b.z, b.c, t=0 * b.t + 1)[1]
    x_t = column(t) * z + column(1 - t) * made
    v, _, w = still(x_t, b.c, t=t)
    fit = ((net(x_t.detach(), b.c, t=t)[2] - z + made.detach()) ** 2).sum(1) / 2
    gap, error = w - v, z - made - v
    product = (gap / divisor(objective, gap, error) * (error - objective.alpha * gap)).sum(1) / 2
    loss = HEAD_WEIGHT * fit + WEIGHT * t * product
    terms = loss_of(objective, net, b)
    assert torch.allclose(terms.notes["pull_w"], (gap**2).sum(1) / 2, rtol=1e-12, atol=0)
    adds(objective, net, b, HEAD_WEIGHT * fit, moved_as=loss, near=1e-12)


@pytest.mark.parametrize(("alpha", "exact"), [(0.5, True), (1.2, False)])
def test_half_of_the_identity_is_the_slope_of_the_divergence(alpha: float, exact: bool) -> None:
    """Gaussian samples of any width; means over both noises, of which +-1 have the moments that matter."""
    s = torch.tensor(1.7, dtype=D, requires_grad=True)
    x, z = torch.tensor(list(product((1, -1), repeat=2)), dtype=D).T[:, :, None]
    for t in torch.tensor([0.2, 0.5, 0.9], dtype=D):
        x_t, v_of, w_of = t * z + (1 - t) * s * x, growth(torch.tensor(0.6, dtype=D), t), growth(s, t)
        (slope,) = torch.autograd.grad(((w_of - v_of) * x_t).square().mean(), s, retain_graph=True)
        objective = Match(alpha=alpha, normalize="none")
        aim = z - s * x
        loss = sid_loss(alpha, w_of.detach() * x_t, v_of * x_t, aim, aim, objective.normalize).mean()
        (found,) = torch.autograd.grad(loss, s)
        assert torch.isclose(2 * found, slope, rtol=1e-12) == exact


def test_the_gradient_of_sim_is_that_of_its_distance_by_w_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaussian samples of any width: points do not move while w changes. Means over both noises by quadrature."""
    c = 2.0  # for the quadrature
    monkeypatch.setattr("dumo.objectives.dmd2.HUBER", c)
    s = torch.tensor(1.7, dtype=D, requires_grad=True)
    nodes, weights = (torch.tensor(a, dtype=D) for a in hermegauss(100))
    x, z = (a.flatten()[:, None] for a in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = (weights[:, None] * weights).flatten() / weights.sum() ** 2
    for t in torch.tensor([0.2, 0.5, 0.9], dtype=D):
        x_t, v_of, w_of = t * z + (1 - t) * s * x, growth(torch.tensor(0.6, dtype=D), t), growth(s, t)
        distance = (((w_of - v_of) * x_t.detach()).square() + c**2).sqrt()
        (slope,) = torch.autograd.grad((weight * distance[:, 0]).sum(), s, retain_graph=True)
        aim = z - s * x
        loss = (weight * sid_loss(1.0, w_of.detach() * x_t, v_of * x_t, aim, aim, SIM.normalize)).sum()
        (found,) = torch.autograd.grad(loss, s)
        assert torch.isclose(found, slope, rtol=1e-10)


def test_the_rest_is_dumo_to_the_bit() -> None:
    net, b = Polynomial(3), drawn(MATCH, 16, progress=1.0)
    first = Polynomial(3)
    first.forward = lambda x, c, /, **at: net(x, c, **at)[:2]  # pyright: ignore[reportAttributeAccessIssue]
    dumo = DuMo(guide=Guide(), slope=JvpSlope()).loss(first, Frozen(first), b)
    mine = MATCH.loss(net, Frozen(net), b)
    assert all(torch.equal(mine.parts[name], dumo.parts[name]) for name in ("v", "u"))
    assert torch.allclose(added(MATCH, net, b) + dumo.loss, mine.loss, rtol=1e-14)


@pytest.mark.parametrize("flow", [gaussian(), PRODUCT])
@ALL
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


# ------------------------------------------------------------------------------------------------------- closed forms


class GaussianNet(nn.Module):
    """Samples N(m, q^2) from noise in one pass, data N(mu, s^2), and the exact velocities of both."""

    def __init__(self, samples: tuple[float, float], data: tuple[float, float]) -> None:
        super().__init__()
        self.samples, self.data = samples, data
        self.probe = nn.Parameter(torch.zeros((), dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor) -> Heads:
        m, q = self.samples
        return velocity(self.data, x, t), x - (m + q * x) + self.probe, velocity(self.samples, x, t)


def variance(b: float, t: Tensor) -> Tensor:
    """D_b, of x_t for data of variance b^2."""
    return (1 - t) ** 2 * b**2 + t**2


def velocity(law: tuple[float, float], x: Tensor, t: Tensor) -> Tensor:
    """Of data N(a, b^2)."""
    (a, b), t = law, column(t)
    return -a + (t - (1 - t) * b**2) / variance(b, t) * (x - (1 - t) * a)


def slopes_of_samples(objective: Match, net: GaussianNet, b: NoisyBatch) -> Tensor:
    """The gradient of the pull's loss of each row with respect to its sample, times the two numbers of a row."""
    u = net(b.z, b.c, t=0 * b.t + 1)[1].detach().requires_grad_()
    (slope,) = torch.autograd.grad(objective.pull(net, b, u).loss.sum(), u)
    return -2 * slope


@ALL
@pytest.mark.parametrize("samples", [(0.3, 0.8), (0.7, 0.8), (0.3, 0.5), (-0.2, 1.4)])
def test_the_pull_vanishes_exactly_if_samples_are_distributed_as_data(
    objective: Match, samples: tuple[float, float]
) -> None:
    data = (0.3, 0.8)
    slope = slopes_of_samples(objective, GaussianNet(samples, data), drawn(objective, 500, progress=1.0))
    assert (slope.abs().max() < 1e-12) == (samples == data)


@pytest.mark.parametrize("objective", [MATCH, DIFF_INSTRUCT], ids=["DMD2", "Diff-Instruct"])
@pytest.mark.parametrize("samples", [(0.7, 0.8), (0.3, 0.5), (-0.2, 1.4)])
def test_the_pull_is_the_closed_form_divided_by_the_distance_of_its_row(
    objective: Match, samples: tuple[float, float]
) -> None:
    """V at each x_t, and its mean over samples and noise, t (mu - m) / D_s."""
    (m, q), (mu, s) = samples, (0.3, 0.8)
    b = drawn(objective, 6000, progress=1.0)
    t, z, made = column(b.drawn["w.t"].to(D)), b.drawn["w.z"].to(D), m + q * b.z
    x_t = t * z + (1 - t) * made
    v = t / (1 - t) * ((x_t - (1 - t) * m) / variance(q, t) - (x_t - (1 - t) * mu) / variance(s, t))
    distance = divisor(objective, v, z - made - velocity((mu, s), x_t, t[:, 0]))
    slope = slopes_of_samples(objective, GaussianNet(samples, (mu, s)), b)
    # A step against the gradient moves samples along V.
    move = -slope / (2 * WEIGHT)
    assert torch.allclose(move, v / distance, rtol=1e-6, atol=1e-9)
    scaled = move * distance * variance(s, t) / t
    error = scaled.std() / scaled.numel() ** 0.5
    assert (scaled.mean() - (mu - m)).abs() < 4 * error


@pytest.mark.parametrize(
    ("alpha", "normalize"), [(None, "distance"), (None, "none"), (1.0, "distance"), (1.0, "huber")]
)
def test_samples_of_another_width_are_moved_back(alpha: float | None, normalize: str) -> None:
    objective = Match.model_validate({"alpha": alpha, "normalize": normalize, "drop": 0.0, "slope": JvpSlope()})
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
