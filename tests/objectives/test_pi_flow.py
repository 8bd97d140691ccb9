"""pi-Flow: its policy against steps of it, its loss by hand, and how near to the flow so many guesses are."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dumo.config.load import load
from dumo.flow.times import Grid
from dumo.objectives import PiFlow
from dumo.objectives.pi_flow import Policy
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


def stepped(x: Tensor, s: Tensor, to: Tensor, *policy: Tensor | Heads, steps: int = 600) -> Tensor:
    """By the midpoint rule."""
    h = (to - s) / steps
    for k in range(steps):
        now = s + k * h
        half = x + column(h / 2) * toward(x, *policy, now)  # pyright: ignore[reportArgumentType]
        x = x + column(h) * toward(half, *policy, now + h / 2)  # pyright: ignore[reportArgumentType]
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
    policy = Policy(source, heads, t, end)
    assert torch.allclose(policy.roll(x, s, to), stepped(x, s, to, source, tuple(heads), t, end), rtol=0, atol=1e-5)
    assert torch.allclose(policy.velocity(x, s), toward(x, source, tuple(heads), t, end, s), rtol=1e-12)
    assert torch.equal(policy.roll(x, s, s), x)
    whole = Policy(source, heads, t, 0 * t)
    assert torch.allclose(whole.roll(x, s, 0 * s), source - 0.9 * heads[0], rtol=1e-12)
    line = Policy(source, heads[:1], t, 0 * t)
    assert torch.allclose(line.roll(source, t, t / 3), source - 0.6 * heads[0], rtol=1e-12)


@pytest.mark.slow
def test_formula() -> None:
    """At three states, of which the policy made two, held still."""
    objective = PiFlow(guesses=3, times=Grid(steps=2))
    net, b = Polynomial(3), drawn(objective, 24, APART, teacher=True)
    heads, end = net(b.x_t, b.c, t=b.t), b.t - 0.5
    policy = b.x_t, tuple(h.detach() for h in heads), b.t, end
    shares = torch.stack([b.drawn["early"], b.drawn["late"]]).to(D)
    first, last = (b.t - share * 0.5 for share in (shares.min(0)[0], shares.max(0)[0]))
    loss = ((heads[2] - b.v_t) ** 2).sum(1) / 2
    for s in (first, last):
        x = stepped(b.x_t, b.t, s, *policy)
        pi = toward(x, b.x_t, heads, b.t, end, s)
        loss = loss + ((pi - APART.velocity(x, b.c, s)) ** 2).sum(1) / 2
    found = objective.loss(net, Frozen(net), b)
    near = last > 0.05  # steps are no closed form near the data
    assert near.sum() > 12
    assert torch.allclose(found.loss[near], loss[near] / 3, rtol=1e-3)
    for mine, hand in zip(gradients(found.loss[near], net), gradients(loss[near] / 3, net), strict=True):
        assert torch.allclose(mine, hand, rtol=1e-3, atol=1e-4)


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
