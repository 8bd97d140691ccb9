"""pi-Flow: its policies against steps of them, its loss by hand, and how near to the flow so many guesses are."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import log
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dumo.config.load import load
from dumo.flow.times import Grid
from dumo.objectives import PiFlow
from dumo.objectives.pi_flow import DXPolicy, MomentumPolicy
from dumo.testing.exact import APART, D, ExactFlow, column
from dumo.types import Frozen, Heads, NoisyBatch, UserError
from theory.exact import PRODUCT, drawn
from theory.formula import Polynomial, gradients

each_flow = pytest.mark.parametrize("flow", [APART, PRODUCT], ids=["gaussian", "mixture"])


def toward(x: Tensor, source: Tensor, heads: Heads, t: Tensor, end: Tensor, s: Tensor) -> Tensor:
    """(x - x^(s)) / s, the guesses told one by one."""
    place = (s - end) / (t - end) * (len(heads) - 1)
    low = place.floor().clamp(max=len(heads) - 2).long()
    guesses = torch.stack([source - column(t) * h for h in heads])
    one, other = (guesses[k, torch.arange(len(x))] for k in (low, low + 1))
    return (x - one - column(place - low) * (other - one)) / column(s)


def grown(x: Tensor, heads: Heads, t: Tensor, s: Tensor) -> Tensor:
    """ArcFlow's policy: a_k exp(l_k (t - s)), mode by mode and number by number, for three modes of two channels."""
    a, (one, other) = heads[:3], heads[3:]
    rates = (0 * t, log(0.2) + (one[:, 0] + one[:, 1]) / 2, log(4) + (other[:, 0] + other[:, 1]) / 2)
    return torch.stack([a_k * column((l_k * (t - s)).exp()) for a_k, l_k in zip(a, rates, strict=True)]).mean(0)


def stepped(x: Tensor, s: Tensor, to: Tensor, velocity: Callable[[Tensor, Tensor], Tensor], steps: int = 600) -> Tensor:
    """By the midpoint rule."""
    h = (to - s) / steps
    for k in range(steps):
        now = s + k * h
        half = x + column(h / 2) * velocity(x, now)
        x = x + column(h) * velocity(half, now + h / 2)
    return x


class Guessing(nn.Module):
    """Knows the mean of the data at each place that the flow goes through; all heads are off by one probe."""

    def __init__(self, flow: ExactFlow, objective: PiFlow) -> None:
        super().__init__()
        self.flow, self.n, self.parts = flow, objective.guesses, objective.times.steps
        self.probe = nn.Parameter(torch.zeros(2, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor) -> Heads:
        end = (t - 1 / self.parts).clamp(min=0)

        def head(i: int) -> Tensor:
            s = end + (t - end) * i / (self.n - 1)
            x_s = self.flow.carry(x, c, t, s)
            return (x - x_s + column(s) * self.flow.guided(x_s, c, s)) / column(t) + self.probe[0] + self.probe[1] * x

        return tuple(head(i) for i in range(self.n))


def pull(objective: PiFlow, net: Guessing, b: NoisyBatch, off: float) -> Tensor:
    """The gradient where all heads are off by so much of 1 and of x_t."""
    net.probe.data.fill_(off)
    return torch.autograd.grad(objective.loss(net, Frozen(net), b).loss.mean(), net.probe)[0]


@pytest.mark.slow
def test_a_policy_is_gone_along_in_closed_form() -> None:
    """Through several pieces; down to data it ends in the guess for them; no time is no way; one guess is a line."""
    g = torch.Generator().manual_seed(0)
    x, source, *heads = torch.randn(6, 5, 2, generator=g, dtype=D)
    t, end = torch.full((5,), 0.9, dtype=D), torch.full((5,), 0.1, dtype=D)
    s, to = torch.tensor([[0.9, 0.8, 0.7, 0.5, 0.31], [0.1, 0.2, 0.6, 0.12, 0.3]], dtype=D)
    policy = DXPolicy(source, heads, t, end)
    by_steps = stepped(x, s, to, lambda x, s: toward(x, source, tuple(heads), t, end, s))
    assert torch.allclose(policy.roll(x, s, to), by_steps, rtol=0, atol=1e-5)
    assert torch.allclose(policy.velocity(x, s), toward(x, source, tuple(heads), t, end, s), rtol=1e-12)
    assert torch.equal(policy.roll(x, s, s), x)
    whole = DXPolicy(source, heads, t, 0 * t)
    assert torch.allclose(whole.roll(x, s, 0 * s), source - 0.9 * heads[0], rtol=1e-12)
    line = DXPolicy(source, heads[:1], t, 0 * t)
    assert torch.allclose(line.roll(source, t, t / 3), source - 0.6 * heads[0], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dx", "momentum"])
def test_formula(kind: Literal["dx", "momentum"]) -> None:
    """At three states, of which the policy made two, held still."""
    objective = PiFlow(policy=kind, guesses=3, times=Grid(steps=2))
    net, b = Polynomial(len(objective.needs.heads)), drawn(objective, 24, APART, teacher=True)
    heads, end = net(b.x_t, b.c, t=b.t), b.t - 0.5

    still = tuple(h.detach() for h in heads)

    def pi(x: Tensor, s: Tensor, heads: Heads = still) -> Tensor:
        return toward(x, b.x_t, heads, b.t, end, s) if kind == "dx" else grown(x, heads, b.t, s)

    shares = torch.stack([b.drawn["early"], b.drawn["late"]]).to(D)
    first, last = (b.t - share * 0.5 for share in (shares.min(0)[0], shares.max(0)[0]))
    loss = ((pi(b.x_t, b.t, heads) - b.v_t) ** 2).sum(1) / 2
    for s in (first, last):
        x = stepped(b.x_t, b.t, s, pi)
        loss = loss + ((pi(x, s, heads) - APART.velocity(x, b.c, s)) ** 2).sum(1) / 2
    found = objective.loss(net, Frozen(net), b)
    near = last > 0.05  # steps are no closed form near the data
    assert near.sum() > 12
    assert torch.allclose(found.loss[near], loss[near] / 3, rtol=1e-3)
    for mine, hand in zip(gradients(found.loss[near], net), gradients(loss[near] / 3, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- momentum


@pytest.mark.slow
def test_a_policy_of_momenta_is_gone_along_in_closed_form() -> None:
    """As by the midpoint rule; in two parts as in one; a rate of 0 is its limit."""
    g = torch.Generator().manual_seed(0)
    x, *heads = torch.randn(6, 5, 2, generator=g, dtype=D)
    heads[3][0] = -log(0.2)  # l_1 = 0
    t = torch.full((5,), 0.9, dtype=D)
    s, to = torch.tensor([[0.9, 0.8, 0.7, 0.5, 0.31], [0.1, 0.2, 0.6, 0.0, 0.3]], dtype=D)
    policy = MomentumPolicy.of(heads, t)
    assert policy.rates[1][0] == 0
    by_steps = stepped(x, s, to, lambda x, s: grown(x, tuple(heads), t, s), steps=3000)
    assert torch.allclose(policy.roll(x, s, to), by_steps, rtol=0, atol=1e-6)
    middle = (2 * s + to) / 3
    assert torch.allclose(policy.roll(policy.roll(x, s, middle), middle, to), policy.roll(x, s, to), rtol=0, atol=1e-14)
    assert torch.allclose(policy.velocity(x, s), grown(x, tuple(heads), t, s), rtol=1e-12)
    assert torch.equal(policy.roll(x, s, s), x)


def test_channels_share_a_rate_at_each_pixel() -> None:
    heads = torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    rates = MomentumPolicy.of(list(heads), torch.ones(2, dtype=D)).rates
    assert [rate.shape for rate in rates] == [(2, 1, 4, 4)] * 3
    assert torch.equal(rates[2], log(4) + heads[4].mean(1, keepdim=True))


class Fixed(nn.Module):
    """Heads as functions of (x, t), off by one probe each."""

    def __init__(self, *heads: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.zeros(len(heads), dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor) -> Heads:
        return tuple(head(x, t) + off for head, off in zip(self.heads, self.probe, strict=True))


def rests(objective: PiFlow, net: Fixed, velocity: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether loss and gradient are zero for a teacher of this velocity, and are not for another."""
    b = drawn(objective, 64)
    loss, slope = (torch.zeros(2), torch.zeros(2))
    for i, off in enumerate((0.0, 0.1)):
        teacher = lambda x, t, c, v, off=off: velocity(x, t) + off  # noqa: E731
        taught = replace(b, teacher=teacher, v_t=velocity(b.x_t, b.t) + off)
        value = objective.loss(net, Frozen(net), taught).loss.mean()
        (grad,) = torch.autograd.grad(value, net.probe)
        loss[i], slope[i] = value.item(), grad.abs().max()
    assert loss[1] > 1e-3
    assert slope[1] > 1e-3
    return bool(loss[0] < 1e-20 and slope[0] < 1e-10)


def test_one_mode_is_exact_for_a_linear_teacher() -> None:
    """V = -l (x - m): from t on, x - m and the velocity grow by exp(l (t - s))."""
    rate, m = 1.7, 0.4

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -rate * (x - m)

    objective = PiFlow(policy="momentum", guesses=2, times=Grid(steps=2))
    zero, double = (lambda x, t: 0 * x), (lambda x, t: 2 * velocity(x, t))  # pi is the mean of two modes
    assert rests(objective, Fixed(zero, double, lambda x, t: 0 * x + rate - log(0.2)), velocity)
    assert not rests(objective, Fixed(zero, double, lambda x, t: 0 * x + rate), velocity)


def test_a_constant_mode_is_exact_for_data_at_one_point() -> None:
    """The flow to m is a line, from t down to data."""
    m = 0.4

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - m) / column(t)

    objective = PiFlow(policy="momentum", guesses=1, times=Grid(steps=1))
    assert objective.needs.heads == ("a0",)
    assert rests(objective, Fixed(velocity), velocity)


@pytest.mark.parametrize(("end", "error"), [(0.0, 5e-4), (0.762, 1e-8)])
def test_sixteen_modes_fit_the_flow_of_a_gaussian(end: float, error: float) -> None:
    """Data N(0, 0.5^2): the velocity along the flow from x_t = 1, with the rates of an untrained network."""
    t = torch.tensor([0.762 if end == 0 else 1.0], dtype=D)
    s = torch.linspace(t.item(), end, 400, dtype=D)
    spread = (s**2 + (1 - s) ** 2 / 4).sqrt()
    velocity = (s - (1 - s) / 4) / spread / spread[0]
    heads = [*torch.eye(16, dtype=D)[:, None], *torch.zeros(15, 1, 16, dtype=D)]
    policy = MomentumPolicy.of(heads, t)
    modes = torch.cat([policy.velocity(heads[0], when[None]) for when in s])
    fitted = torch.linalg.lstsq(modes, velocity[:, None], driver="gelsd").solution
    assert (modes @ fitted - velocity[:, None]).abs().max() < error


@pytest.mark.nightly
@each_flow
def test_it_rests_at_the_flow_to_the_order_of_its_guesses(flow: ExactFlow) -> None:
    """Between guesses the mean of the data is a line: the velocity is off by the square of their distance, and with its
    error the gradient of the mean square vanishes."""
    left: list[Tensor] = []
    for n in (5, 9, 17):
        objective = PiFlow(guesses=n, times=Grid(steps=2))
        net, b = Guessing(flow, objective), drawn(objective, 128, flow, teacher=True)
        left.append(objective.loss(net, Frozen(net), b).loss.mean().sqrt())
        rest, away = (pull(objective, net, b, off) for off in (0.0, 0.1))
        assert (away - rest).sum() > 0.1  # descent leads back
    for coarse, fine in pairwise(left):
        assert 2.8 < coarse / fine < 5.5


def test_a_record_without_a_teacher_is_refused() -> None:
    objective = PiFlow(guesses=3, times=Grid(steps=2))
    net, b = Polynomial(3), drawn(objective, 24, APART)
    with pytest.raises(UserError, match=r"'pi_flow' learns from a teacher's velocity, .* add_noise\(.*teacher=.*\)"):
        objective.loss(net, Frozen(net), b)


def test_a_jump_begins_at_the_top_of_a_segment() -> None:
    readings = PiFlow(times=Grid(steps=4)).readings(nn.Identity())
    assert readings.hops is not None
    for t, s, taught in ((1.0, 0.75, True), (0.75, 0.6, True), (1.0, 0.5, False), (0.9, 0.8, False), (0.0, 0.0, False)):
        assert readings.hops(t, s) == taught
    assert readings.endpoint is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("teacher=null", "learns from a teacher's velocity"),
        ("sample.nfe=[3]", "does not train"),
        ("objective.guesses=3", "start.heads.d3"),
    ],
)
def test_what_does_not_go_together_is_refused(change: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load("digits-pi-flow", [change])
