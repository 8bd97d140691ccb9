"""DMD2: both losses by hand, closed forms of Gaussian samples, its rest where samples are the data, and its passes."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dumo.flow.noise_schedule import Schedule
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Diffusion, Linear
from dumo.flow.solver import Hop, Restart, check
from dumo.flow.times import OfSampler, Uniform
from dumo.nets.dit import DiT
from dumo.objectives.dmd2 import DMD2, FLOOR, HUBER
from dumo.run.flops import forward_units, teacher_passes
from dumo.testing.exact import APART, D, ExactFlow, ExactNet, column, gaussian, gradient
from dumo.testing.properties import loss_of
from dumo.types import Frozen, Heads, NoisyBatch, UserError
from theory.exact import PRODUCT, drawn
from theory.formula import Polynomial, agree, passes

OBJECTIVE = DMD2(times=OfSampler(steps=3, m=0.6))
LAST = OBJECTIVE.fake_updates  # the step of a cycle in which samples move
STABLE_DIFFUSION = Diffusion(schedule=Schedule(kind="scaled_linear", start=0.00085, end=0.012, steps=1000))


def by_hand(net: nn.Module, b: NoisyBatch) -> tuple[Tensor, Tensor]:
    """Samples, with gradients of the last jump alone, and their diffused noise: row by row, as a sampler would."""
    start = b.path.initial_std
    times = OBJECTIVE.times.taught
    made: list[Tensor] = []
    for i in range(len(b.t)):
        x = start * b.z[i : i + 1]
        x_0 = x
        for k, t in enumerate(times[: i % 3 + 1]):
            t_row = b.t[i : i + 1] if k == i % 3 else torch.tensor([t], dtype=D)  # drawn in float32
            x_0 = x - t_row * net(x, b.c[i : i + 1], t=t_row)[0]
            if k < i % 3:
                s = torch.tensor([times[k + 1]], dtype=D)
                noise = b.drawn[f"z_{k + 1}"][i : i + 1].to(D)
                x = (b.path.alpha(s) * noise + b.path.gamma(s) * x_0).detach()  # pyright: ignore[reportAttributeAccessIssue]
        made.append(x_0)
    return torch.cat(made), b.drawn["fake.z"].to(D)


@pytest.mark.parametrize("path", [None, STABLE_DIFFUSION], ids=["linear", "diffusion"])
@pytest.mark.parametrize("fake_loss", ["velocity", "noise"])
def test_the_fake_score_learns_the_velocity_of_samples(path: Diffusion | None, fake_loss: str) -> None:
    objective = OBJECTIVE.model_copy(update={"fake_loss": fake_loss})
    net, b = Polynomial(2), on(path, drawn(objective, 9))
    samples, z = by_hand(net, b)
    t = b.drawn["fake.t"].to(D)
    x_t, w_star = b.path.at(samples.detach(), z, t)
    w = net(x_t, b.c, t=t)[1]
    error = (w - w_star).square().mean(1)
    # A prediction of noise from the velocity: at x_t it is x_t plus the weight of data times the velocity per unit.
    weight = b.path.gamma(t) ** 2 if fake_loss == "noise" else 1
    agree(objective, net, b, weight * error, {"w": error})


@pytest.mark.parametrize("path", [None, STABLE_DIFFUSION], ids=["linear", "diffusion"])
def test_samples_move_by_the_normalized_difference_of_scores(path: Diffusion | None) -> None:
    net, b = Polynomial(2), replace(on(path, drawn(OBJECTIVE, 9, APART, teacher=True)), step=LAST)
    samples, z = by_hand(net, b)
    t = b.drawn["pull.t"].to(D)
    x_t, w_star = b.path.at(samples.detach(), z, t)
    w = net(x_t, b.c, t=t)[1].detach()
    v = APART.velocity(x_t, b.c, t)
    move = (w - v) / column((w_star - v).abs().mean(1))
    loss = (samples - (samples + move).detach()).square().mean(1) / 2
    fake = (w - w_star).square().mean(1)
    agree(OBJECTIVE, net, b, loss, {"w": fake}, pull_w=(w - v).square().mean(1))


def on(path: Diffusion | None, b: NoisyBatch) -> NoisyBatch:
    """The batch on another path."""
    return b if path is None else replace(b, path=path)


def test_a_row_without_distance_does_not_divide_by_zero() -> None:
    b = replace(drawn(OBJECTIVE, 3, teacher=True), step=LAST, teacher=lambda x, t, c, v: v)
    terms = loss_of(OBJECTIVE, Polynomial(2), b)
    assert terms.loss.isfinite().all()
    assert (terms.loss > 1 / FLOOR).any()


# ------------------------------------------------------------------------------------------------------- closed forms


class GaussianSamples(nn.Module):
    """A generator of samples N(m, q^2) from any of its inputs, and their exact velocity as the fake score."""

    def __init__(self, m: float, q: float) -> None:
        super().__init__()
        self.m, self.q = m, q
        self.probe = nn.Parameter(torch.zeros(2, 2, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor) -> Heads:
        t = column(t)
        x_0 = self.m + self.q * (x - (1 - t) * self.m) / variance(self.q, t).sqrt()
        heads = (x - x_0) / t, velocity(self.m, self.q, x, t)
        return tuple(head + a + b * x for head, (a, b) in zip(heads, self.probe, strict=True))


def variance(b: float, t: Tensor) -> Tensor:
    """D_b, of x_t for data of variance b^2."""
    return (1 - t) ** 2 * b**2 + t**2


def velocity(a: float, b: float, x: Tensor, t: Tensor) -> Tensor:
    """Of data N(a, b^2)."""
    return -a + (t - (1 - t) * b**2) / variance(b, t) * (x - (1 - t) * a)


def pulled(samples: tuple[float, float], data: tuple[float, float], b: NoisyBatch) -> Tensor:
    """w - v at the diffused samples, (b, 2): the loss's own, by its gradient with the normalizer taken back."""
    net = GaussianSamples(*samples)
    seen: dict[str, Tensor] = {}

    def teacher(x: Tensor, t: Tensor, c: Tensor, v: Tensor) -> Tensor:
        seen.update(x=x, distance=(v - velocity(*data, x, column(t))).abs().mean(1))
        return velocity(*data, x, column(t))

    u_of: list[Tensor] = []

    def recorded(x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        heads = net(x, c, **inputs)
        if torch.is_grad_enabled():
            u_of.append(heads[0])
        return heads

    loss = OBJECTIVE.loss(recorded, Frozen(net), replace(b, teacher=teacher, step=LAST)).loss
    (u,) = u_of
    (slope,) = torch.autograd.grad(loss.sum(), u)
    return 2 * slope * column(seen["distance"]) / column(b.t.to(D))


def closed(samples: tuple[float, float], data: tuple[float, float], x: Tensor, t: Tensor) -> Tensor:
    """w - v at x_t."""
    (m, q), (mu, s) = samples, data
    return t / (1 - t) * ((x - (1 - t) * m) / variance(q, t) - (x - (1 - t) * mu) / variance(s, t))


@pytest.mark.parametrize("samples", [(0.3, 0.8), (0.7, 0.8), (0.3, 0.5), (-0.2, 1.4)])
def test_the_pull_is_zero_exactly_where_samples_are_distributed_as_data(samples: tuple[float, float]) -> None:
    data = (0.3, 0.8)
    b = drawn(OBJECTIVE, 6000)
    pull = pulled(samples, data, b)
    if samples == data:
        assert pull.abs().max() < 1e-12
        return
    assert pull.abs().min(1).values.median() > 1e-2
    # Its mean over samples and noise, of each time, is t (mu - m) / D_s: the pull times D_s / t has that of mu - m.
    t = column(b.drawn["pull.t"].to(D))
    scaled = pull * variance(data[1], t) / t
    error = scaled.std() / scaled.numel() ** 0.5
    assert (scaled.mean() - (data[0] - samples[0])).abs() < 4 * error + 1e-6
    # At each point it is the closed form.
    net = GaussianSamples(*samples)
    made, z = by_hand(net, b)
    assert torch.allclose(pull, closed(samples, data, t * z + (1 - t) * made.detach(), t), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("mean", "width", "rests"), [(1.3, 0.8, True), (0.5, 0.8, False), (1.3, 0.9, False)])
def test_guided_it_rests_beyond_the_data(mean: float, width: float, rests: bool) -> None:
    """Of one width s the guided velocity is that of N(mu_0 + g (mu - mu_0), s^2): here -0.1, 0.6 and g = 2."""
    b = drawn(OBJECTIVE, 30)

    def guided(x: Tensor, t: Tensor, c: Tensor, v: Tensor) -> Tensor:
        null, full = (velocity(mu, 0.8, x, column(t)) for mu in (-0.1, 0.6))
        return null + 2 * (full - null)

    b = replace(b, teacher=guided, step=LAST)
    pull = loss_of(OBJECTIVE, GaussianSamples(mean, width), b).notes["pull_w"]
    assert (pull.max() < 1e-20) == rests


@pytest.mark.parametrize("flow", [APART, PRODUCT])
def test_samples_are_at_rest_on_exact_mixtures(flow: ExactFlow) -> None:
    """Whatever the generator: with one velocity for samples and data; with another they are not."""
    b = replace(drawn(OBJECTIVE, 60, flow, teacher=True), step=LAST)
    net = ExactNet(flow, OBJECTIVE.needs)
    assert gradient(OBJECTIVE, net, b)[0].abs().max() < 1e-10
    net.probe.data[1, 0] = 0.1
    assert gradient(OBJECTIVE, net, b)[0].abs().max() > 1e-3


def test_the_fake_score_is_at_rest_at_the_velocity_of_samples() -> None:
    """The mean over both noises, exactly: the gradient is of second order in them, of which +-1 have the moments."""
    objective = DMD2(times=OfSampler(steps=1))
    z, z_own = (column(a).expand(4, 2) for a in torch.tensor(list(product((1, -1), repeat=2)), dtype=D).T)
    for t, (m, q) in product((0.1, 0.5, 1.0), ((0.3, 0.8), (-0.5, 1.2))):
        b = drawn(objective, 4)
        b = replace(b, z=z, drawn={**b.drawn, "fake.z": z_own, "fake.t": torch.full_like(b.t, t, dtype=D)})
        net = GaussianSamples(m, q)
        (left,) = torch.autograd.grad(loss_of(objective, net, b).loss.mean(), net.probe)
        assert left.abs().max() < 1e-12
        net.probe.data[1, 1] = 0.1
        (left,) = torch.autograd.grad(loss_of(objective, net, b).loss.mean(), net.probe)
        assert left[1].abs().max() > 1e-2
        assert not left[0].any(), "the generator is not trained by the loss of the fake score"


# ------------------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(("step", "count"), [(0, (1, 4)), (4, (1, 4)), (5, (1, 4)), (6, (1, 4))])
def test_number_of_passes(step: int, count: tuple[int, int]) -> None:
    """Three passes on part of the rows; the last jump and the fake score, one of which has gradients."""
    objective = DMD2()
    assert passes(objective, replace(drawn(objective, 16), step=step)) == count


@pytest.mark.parametrize(("step", "trained"), [(0, "w"), (4, "w"), (5, "u"), (6, "w"), (11, "u")])
def test_five_steps_of_the_fake_score_then_one_of_the_generator(step: int, trained: str) -> None:
    objective = DMD2()
    x, c = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=D), torch.arange(16) % 3
    b = draw(objective, Linear(), x, c, 3, seed=0, step=step, teacher=lambda x, t, c, v: v + 1)
    net = ExactNet(gaussian(), objective.needs)
    grad = gradient(objective, net, b)
    assert [bool(row.any()) for row in grad] == [trained == "u", trained == "w"]


def test_cost() -> None:
    """1.5 F for the inputs, 3 for what is trained, 1 for the other; in one step of six 1 of the teacher."""
    spec, shape = DiT(width=64, depth=4, patch=2, attention=2), (1, 8, 8)
    objective = DMD2()
    net = spec.build(objective.needs, shape, 3)
    assert forward_units(net, objective, Linear(), shape) == pytest.approx(5.5, rel=0.03)
    assert teacher_passes(net, objective, Linear(), shape) == pytest.approx(1 / 6)


def test_rows_that_miss_a_time_are_refused() -> None:
    with pytest.raises(UserError, match="multiples of 3"):
        loss_of(OBJECTIVE, Polynomial(2), drawn(OBJECTIVE, 9)[:4])


@pytest.mark.parametrize(("m", "nfe", "is_taught"), [(0.6, 3, True), (0.6, 1, True), (0.6, 2, False), (0.5, 3, False)])
def test_it_is_sampled_at_its_times_alone(m: float, nfe: int, is_taught: bool) -> None:
    readings = OBJECTIVE.readings(Polynomial(2))
    if is_taught:
        check(Restart(m=m), readings, nfe)
        return
    with pytest.raises(UserError, match="untrained times"):
        check(Restart(m=m), readings, nfe)


# -------------------------------------------------------------------------------------------- methods that are settings

TDM = DMD2(times=OfSampler(solver="hop", steps=3, m=0.6), fake_updates=1)
PHASED = DMD2(times=OfSampler(steps=3, m=0.6), phased=True)
SID = DMD2(times=OfSampler(steps=3, m=0.6), alpha=1.2)
SIM = DMD2(times=OfSampler(steps=3, m=0.6), alpha=1.0, normalize="huber")
DIFF_INSTRUCT = DMD2(times=OfSampler(steps=3, m=0.6), fake_updates=1, normalize="none")


def pulls(objective: DMD2, b: NoisyBatch, **changes: object) -> NoisyBatch:
    """The batch in a step that moves samples."""
    return replace(b, step=objective.fake_updates, **changes)  # pyright: ignore[reportArgumentType]


def along_the_trajectory(net: nn.Module, b: NoisyBatch) -> tuple[Tensor, Tensor, Tensor]:
    """TDM: each row's x_t, its sample x' with gradients, and x_s = x_t - (t - s) u, row by row."""
    times = [*TDM.times.taught, 0.0]
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(len(b.t)):
        x_s = b.z[i : i + 1]
        x_t = x_0 = x_s
        for k in range(i % 3 + 1):
            x_t = x_s.detach()
            t, s = (b.t, b.r) if k == i % 3 else (torch.full_like(b.t, times[k]), torch.full_like(b.t, times[k + 1]))
            t, s = t[i : i + 1], s[i : i + 1]
            u = net(x_t, b.c[i : i + 1], t=t)[0]
            x_0, x_s = x_t - t * u, x_t - (t - s) * u
        rows.append((x_t, x_0, x_s))
    x_t, x_0, x_s = (torch.cat(column) for column in zip(*rows, strict=True))
    return x_t, x_0, x_s


def noised(b: NoisyBatch, x_s: Tensor, drawn_t: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TDM's x'_tau, tau, the velocity to learn, and k of (5), of points x_s at b.r."""
    s, z = column(b.r), b.drawn["fake.z"].to(D)
    t = s + column(b.drawn[drawn_t].to(D)) * column(b.t - b.r)
    a = (1 - t) / (1 - s)
    std = (t**2 - (a * s) ** 2).sqrt()
    x = a * x_s + std * z
    # The score of x given x_s, as a velocity: score = -(x + (1 - t) w) / t.
    score = -z / std
    w_star = torch.where(t < 1, -(x + t * score) / (1 - t), z - x_s / (1 - s))
    k = (t + (1 - t) * s**2 / (1 - s) ** 2) / std
    return x, t[:, 0], w_star, k[:, 0]


def test_tdm_learns_the_score_of_points_of_the_trajectory() -> None:
    net, b = Polynomial(2), drawn(TDM, 9)
    x, t, w_star, k = noised(b, along_the_trajectory(net, b)[2].detach(), "fake.t")
    error = (net(x, b.c, t=t)[1] - w_star).square().mean(1) / k**2
    agree(TDM, net, b, error, {"w": error}, close=1e-9)


def test_tdm_moves_samples_by_the_scores_of_points_of_the_trajectory() -> None:
    net, b = Polynomial(2), pulls(TDM, drawn(TDM, 9, APART, teacher=True))
    _, samples, x_s = along_the_trajectory(net, b)
    x, t, w_star, k = noised(b, x_s.detach(), "pull.t")
    w, v = net(x, b.c, t=t)[1].detach(), APART.velocity(x, b.c, t)
    m = ((x - samples) / column(t) - v).abs().mean(1).detach()
    loss = (samples - (samples + (w - v) / column(m)).detach()).square().mean(1) / 2
    fake = (w - w_star).square().mean(1) / k**2
    agree(TDM, net, b, loss, {"w": fake}, close=1e-9, pull_w=(w - v).square().mean(1))


class Jumps(nn.Module):
    """Each jump makes points x_s of N((1 - s) m, S(s)^2), S of q, and the fake score is their velocity at t > s.

    It is that of data N(m, q^2), of which x_s is the point of the flow.
    """

    def __init__(self, m: float, q: float, times: list[float]) -> None:
        super().__init__()
        self.m, self.q = m, q
        self.next = dict(zip(times, [*times[1:], 0.0], strict=True))
        self.probe = nn.Parameter(torch.zeros(2, 2, dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor) -> Heads:
        s = column(
            torch.tensor([min(self.next.values(), key=lambda s: abs(s - self._end(a))) for a in t.tolist()], dtype=D)
        )
        t = column(t)
        ratio = (variance(self.q, s) / variance(self.q, t)).sqrt()
        x_s = (1 - s) * self.m + ratio * (x - (1 - t) * self.m)
        heads = (x - x_s) / (t - s), velocity(self.m, self.q, x, t)
        return tuple(head + a + b * x for head, (a, b) in zip(heads, self.probe, strict=True))

    def _end(self, t: float) -> float:
        """The next time after t, which has been rounded."""
        return self.next[min(self.next, key=lambda a: abs(a - t))]


@pytest.mark.parametrize("samples", [(0.3, 0.8), (0.7, 0.8), (0.3, 0.5)])
def test_tdm_is_at_rest_exactly_where_trajectories_are_those_of_the_data(samples: tuple[float, float]) -> None:
    b = pulls(TDM, drawn(TDM, 300), teacher=lambda x, t, c, v: velocity(0.3, 0.8, x, column(t)))
    net = Jumps(*samples, TDM.times.taught)
    pull = loss_of(TDM, net, b).notes["pull_w"]
    if samples == (0.3, 0.8):
        assert pull.max() < 1e-20
        (left,) = torch.autograd.grad(loss_of(TDM, net, b).loss.mean(), net.probe)
        assert left[0].abs().max() < 1e-10
        return
    assert pull.median() > 1e-3
    _, _, x_s = along_the_trajectory(net, b)
    x, t, _, _ = noised(b, x_s.detach(), "pull.t")
    expected = closed(samples, (0.3, 0.8), x, column(t))
    inside = t < 0.999
    assert torch.allclose(pull[inside], expected.square().mean(1)[inside], rtol=1e-5)


def test_tdm_fake_score_is_at_rest_at_the_velocity_of_noised_points() -> None:
    """The mean over both noises, exactly, as of DMD2 above: here of the jump from 1 to the next time."""
    z, z_own = (column(a).expand(4, 2) for a in torch.tensor(list(product((1, -1), repeat=2)), dtype=D).T)
    first, second = TDM.times.taught[:2]
    for share in (0.1, 0.5, 0.9):
        b = drawn(TDM, 12)[[0, 3, 6, 9]]
        b = replace(b, z=z, r=torch.full_like(b.r, second, dtype=D), t=torch.full_like(b.t, first, dtype=D))
        b = replace(b, drawn={**b.drawn, "fake.z": z_own, "fake.t": torch.full_like(b.t, share, dtype=D)})
        net = Jumps(0.3, 0.8, TDM.times.taught)
        one_jump = TDM.model_copy(update={"times": OneJump(end=second)})
        (left,) = torch.autograd.grad(loss_of(one_jump, net, b).loss.mean(), net.probe)
        assert left.abs().max() < 1e-12
        net.probe.data[1, 1] = 0.1
        (left,) = torch.autograd.grad(loss_of(one_jump, net, b).loss.mean(), net.probe)
        assert left[1].abs().max() > 1e-3


class OneJump(OfSampler):
    """A first jump alone."""

    solver: str = "hop"  # pyright: ignore[reportIncompatibleVariableOverride, reportAssignmentType]
    steps: int = 1
    end: float


def test_phased_times_are_those_between_the_ends_of_a_jump() -> None:
    """(2) and (3) are as of DMD2 at these times: samples with fresh noise have the same distribution there."""
    net, b = Polynomial(2), drawn(PHASED, 9, APART, teacher=True)
    for step, name in ((0, "fake.t"), (LAST, "pull.t")):
        t = b.r + b.drawn[name].to(D) * (b.t - b.r)
        placed = replace(b, step=step, drawn={**b.drawn, name: t})
        phased, plain = (loss_of(o, net, x).loss for o, x in ((PHASED, replace(b, step=step)), (OBJECTIVE, placed)))
        assert torch.allclose(phased, plain, rtol=1e-12)
        assert ((b.r <= t) & (t <= b.t)).all()


def test_diff_instruct_moves_samples_by_the_difference_itself() -> None:
    net, b = Polynomial(2), pulls(DIFF_INSTRUCT, drawn(DIFF_INSTRUCT, 9, APART, teacher=True))
    samples, z = by_hand(net, b)
    t = b.drawn["pull.t"].to(D)
    x_t, w_star = b.path.at(samples.detach(), z, t)
    w, v = net(x_t, b.c, t=t)[1].detach(), APART.velocity(x_t, b.c, t)
    loss = (samples - (samples + w - v).detach()).square().mean(1) / 2
    agree(DIFF_INSTRUCT, net, b, loss, {"w": (w - w_star).square().mean(1)}, pull_w=(w - v).square().mean(1))


@pytest.mark.parametrize("path", [None, STABLE_DIFFUSION], ids=["linear", "diffusion"])
@pytest.mark.parametrize("objective", [SID, SIM], ids=["sid", "sim"])
def test_sid_differentiates_both_scores_by_their_input(objective: DMD2, path: Diffusion | None) -> None:
    net, b = Polynomial(2), pulls(objective, on(path, drawn(objective, 9, APART, teacher=True)))
    score = Polynomial(2).requires_grad_(False)
    samples, z = by_hand(net, b)
    t = b.drawn["pull.t"].to(D)
    x_t, w_star = b.path.at(samples, z, t)
    w, v = score(x_t, b.c, t=t)[1], APART.velocity(x_t, b.c, t)
    gap = w - v
    if objective.normalize == "distance":
        weight = t / (w_star - v).detach().abs().mean(1)
        product_ = gap * (w_star - v) - 1.2 * gap**2
    else:
        weight = t
        product_ = gap / column((gap.square().mean(1) + HUBER**2).sqrt()) * (w_star - w)
    loss = weight * product_.mean(1)
    fake = (w - w_star).square().mean(1)
    agree(objective, net, b, loss, {"w": fake}, close=1e-9, pull_w=gap.square().mean(1))


@pytest.mark.parametrize("objective", [SID, SIM], ids=["sid", "sim"])
@pytest.mark.parametrize("mean", [0.3, 0.7])
def test_sid_moves_the_mean_of_samples_to_that_of_the_data(objective: DMD2, mean: float) -> None:
    """With samples of the data's width V = t (mu - m) / D_s, and the loss descends along V t / D_s."""
    b = pulls(objective, drawn(objective, 30), teacher=lambda x, t, c, v: velocity(0.3, 0.8, x, column(t)))
    net = GaussianSamples(mean, 0.8)
    loss = objective.loss(net, Frozen(net), b).loss
    (left,) = torch.autograd.grad(loss.sum(), net.probe)
    if mean == 0.3:
        assert left.abs().max() < 1e-12
        return
    samples, z = by_hand(net, b)
    t = column(b.drawn["pull.t"].to(D))
    x_t, w_star = b.path.at(samples.detach(), z, t[:, 0])
    gap = t * (0.3 - mean) / variance(0.8, t)
    along = -gap * t / variance(0.8, t)  # summed over two features, of which the loss is the mean
    if objective.normalize == "distance":
        weight = t / column((w_star - velocity(0.3, 0.8, x_t, t)).abs().mean(1))
    else:
        weight = t / (gap**2 + HUBER**2).sqrt()
    by_u = -column(b.t.to(D)) * weight * along
    assert torch.allclose(left[0, 0], by_u.sum(), rtol=1e-9)
    assert not left[1].any()


@pytest.mark.parametrize(("mean", "rests"), [(1.3, True), (0.6, False)])
def test_guidance_at_its_own_times_rests_beyond_the_data(mean: float, rests: bool) -> None:
    """Of one width s and at one time, where the guided data do: -0.1, 0.6 and scale 2, without m."""
    half_way = Uniform(low=0.5, high=0.5)
    objective = DMD2(
        times=OfSampler(steps=3, m=0.6), normalize="none", scale=2.0, pull_times=half_way, scale_times=half_way
    )
    b = drawn(objective, 30)

    def teacher(x: Tensor, t: Tensor, c: Tensor, v: Tensor) -> Tensor:
        mu = column(torch.tensor([0.6, -0.1], dtype=D)[(c == b.null).long()])
        return -mu + (column(t) - (1 - column(t)) * 0.64) / variance(0.8, column(t)) * (x - (1 - column(t)) * mu)

    net = GaussianSamples(mean, 0.8)
    (left,) = torch.autograd.grad(loss_of(objective, net, pulls(objective, b, teacher=teacher)).loss.sum(), net.probe)
    assert (left[0].abs().max() < 1e-10) == rests


def test_guidance_has_times_noise_and_a_divisor_of_its_own() -> None:
    objective = DMD2(times=OfSampler(steps=3, m=0.6), scale=3.0)
    net, b = Polynomial(2), pulls(objective, drawn(objective, 9, APART, teacher=True))
    samples, z = by_hand(net, b)
    t, tau = b.drawn["pull.t"].to(D), b.drawn["scale.t"].to(D)
    x_t, w_star = b.path.at(samples.detach(), z, t)
    w, v = net(x_t, b.c, t=t)[1].detach(), APART.velocity(x_t, b.c, t)
    x_tau, straight = b.path.at(samples.detach(), b.drawn["scale.z"].to(D), tau)
    v_tau, v_null = APART.velocity(x_tau, b.c, tau), APART.velocity(x_tau, b.null, tau)
    guided = v_null + 3 * (v_tau - v_null)
    move = (w - v) / column((w_star - v).abs().mean(1))
    move = move + 2 * (v_null - v_tau) / column((straight - guided).abs().mean(1))
    loss = (samples - (samples + move).detach()).square().mean(1) / 2
    fake = (w - w_star).square().mean(1)
    agree(objective, net, b, loss, {"w": fake}, pull_w=(w - v).square().mean(1))


@pytest.mark.parametrize(
    ("objective", "units", "teacher"),
    [
        (DMD2(times=OfSampler(solver="hop"), fake_updates=1), 5.5, 0.5),
        (
            DMD2(alpha=1.2, fake_updates=1),
            6.0,
            1.0,
        ),  # one more F, as the pull of the fake score's input, every other step
        (DMD2(scale=4.0), 5.5, 0.5),
        (DMD2(phased=True), 5.5, 1 / 6),
    ],
    ids=["tdm", "sid", "decoupled", "phased"],
)
def test_cost_of_a_setting(objective: DMD2, units: float, teacher: float) -> None:
    """Where a score is differentiated by its input, another pass is counted."""
    spec, shape = DiT(width=64, depth=4, patch=2, attention=2), (1, 8, 8)
    net = spec.build(objective.needs, shape, 3)
    assert forward_units(net, objective, Linear(), shape) == pytest.approx(units, rel=0.03)
    assert teacher_passes(net, objective, Linear(), shape) == pytest.approx(teacher)


@pytest.mark.parametrize(
    ("m", "nfe", "is_taught"), [(0.6, 3, True), (0.6, 1, False), (None, 3, False), (0.6, 2, False)]
)
def test_tdm_makes_the_jumps_of_training_alone(m: float | None, nfe: int, is_taught: bool) -> None:
    readings = TDM.readings(Polynomial(2))
    assert readings.endpoint is None
    if is_taught:
        check(Hop(m=m), readings, nfe)
        return
    with pytest.raises(UserError, match="untrained times"):
        check(Hop(m=m), readings, nfe)


def test_guidance_without_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match="SiD"):
        DMD2(alpha=1.0, scale=2.0)
