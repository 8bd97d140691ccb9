"""Laws of time against their closed forms: moments, distribution functions and shares."""

from math import comb, erf, log, pi, sqrt
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from contract.case import members
from dumo.flow.times import (
    Arctan,
    Atom,
    Below,
    Beta,
    Dyadic,
    Gap,
    Groups,
    Jumps,
    Karras,
    LogitNormal,
    Pair,
    Times,
    ToData,
    Uniform,
)
from dumo.runtime.random import stream

N = 200_000
NOISE = 5 / sqrt(N)  # five standard errors of a mean of numbers in [0, 1], whose deviation is at most 1/2, doubled


def draws(law: Times) -> tuple[Tensor, Tensor]:
    t, r = law(N, stream(0, "law", repr(law)))
    return t.double(), r.double()


@pytest.mark.parametrize(("a", "b"), [(2.4, 2.4), (1.0, 1.0), (0.8, 1.0), (5.0, 2.0)])
def test_moments_of_beta(a: float, b: float) -> None:
    """E[t^k] = product of (a + i) / (a + b + i) over i < k."""
    t, _ = draws(Beta(a=a, b=b))
    moment = 1.0
    for k in range(4):
        moment *= (a + k) / (a + b + k)
        assert abs((t ** (k + 1)).mean() - moment) < NOISE / 2


def test_distribution_of_beta() -> None:
    """For whole a and b, P(t <= x) is a binomial tail; asymmetric, so that a and b are told apart."""
    t, _ = draws(Beta(a=2, b=4))
    for x in (0.1, 0.3, 0.6):
        tail = sum(comb(5, k) * x**k * (1 - x) ** (5 - k) for k in range(2, 6))
        assert abs((t <= x).double().mean() - tail) < NOISE


@pytest.mark.parametrize(("mean", "std"), [(-0.4, 1.0), (0.0, 1.0), (-2.0, 2.0)])
def test_distribution_of_logit_normal(mean: float, std: float) -> None:
    t, _ = draws(LogitNormal(mean=mean, std=std))
    for x in (0.1, 0.4, 0.5, 0.9):
        below = (1 + erf((log(x / (1 - x)) - mean) / std / sqrt(2))) / 2
        assert abs((t <= x).double().mean() - below) < NOISE
    logit = t.logit()
    assert abs(logit.mean() - mean) < 10 * std / sqrt(N)
    assert abs(logit.std() - std) < 10 * std / sqrt(N)


def test_pairs_are_the_larger_and_the_smaller_of_two() -> None:
    """Of two uniform draws the larger has the density 2 x and the mean 2/3, the smaller 1/3; they keep E[t r] = 1/4."""
    t, r = draws(Pair(of=Uniform(), velocity_ratio=0))
    assert abs(t.mean() - 2 / 3) < NOISE
    assert abs(r.mean() - 1 / 3) < NOISE
    assert abs((t * r).mean() - 1 / 4) < NOISE
    for x in (0.3, 0.8):
        assert abs((t <= x).double().mean() - x**2) < NOISE
        assert abs((r <= x).double().mean() - (1 - (1 - x) ** 2)) < NOISE


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_rows_said_to_rest_rest_by_the_law_of_the_larger_and_the_others_move(ratio: float) -> None:
    """r moves up to t, not t down to r (MeanFlow's own code). A derivative is spared for rows at rest, and no others:
    u* = v* - (t - r) du/dt forgets it at r = t."""
    law = Pair(of=Uniform(), velocity_ratio=ratio)
    (t, r), moving = draws(law), torch.tensor(law.moving(N))
    assert (t == r)[~moving].all()
    assert (t > r)[moving].double().mean() > 1 - 1e-5  # two of 2^24 numbers may be one
    assert abs(moving.double().mean() - (1 - ratio)) < 1e-9
    for some, mean in ((t[~moving], 2 / 3), (t[moving], 2 / 3), (r[moving], 1 / 3)):
        assert abs(some.mean() - mean) < 2 * NOISE


@pytest.mark.parametrize("law", [cls() for cls in members(Times)])
def test_times_are_in_order_and_in_the_unit_interval(law: Times) -> None:
    t, r = draws(law)
    assert t.shape == r.shape == (N,)
    assert (r >= 0).all()
    assert (r <= t).all()
    assert (t <= 1).all()
    assert t.std() > 0.05
    if isinstance(law, ToData):
        assert not r.any()


def test_a_law_of_times_draws_numbers_for_the_whole_batch_and_gives_rows() -> None:
    law = LogitNormal(mean=-0.4, std=2.0)
    whole, some = (law.rows((1, "s"), rows, N, (3, 5)) for rows in (range(N), range(7, 40)))
    assert uniform(normal((whole.double().logit() + 0.4) / 2))
    assert torch.equal(some, whole[7:40])


def uniform(share: Tensor) -> bool:
    """Kolmogorov: whether numbers are uniform in [0, 1]. By chance they are held not to be once in 30,000 times."""
    share = share.double().sort().values
    steps = torch.arange(1, len(share) + 1, dtype=torch.float64) / len(share)
    off = torch.maximum((steps - share).abs(), (steps - 1 / len(share) - share).abs()).max()
    return bool(off * sqrt(len(share)) < 2.35)


def normal(x: Tensor) -> Tensor:
    """Phi(x)."""
    return torch.special.ndtr(x.double())


def test_the_test_of_uniformity_can_fail() -> None:
    u = torch.rand(N, generator=stream(4), dtype=torch.float64)
    assert [uniform(x) for x in (u, u**1.02, 0.99 * u)] == [True, False, False]


def pair(mean: float, to: float, std: float) -> Pair:
    """Without rows at rest."""
    return Pair(of=LogitNormal(mean=mean, std=std), to=LogitNormal(mean=to, std=std), velocity_ratio=0)


SOFLOW = pair(0.2, -1.0, 0.8)
TABLE = [  # law; E[t], P(t > 0.95) and P(t - r > 0.9), of rows that may move; worked out by others, once
    (Pair(velocity_ratio=0), 0.535, 8e-4, None),  # MeanFlow, ImageNet; 1.44e-5 by quadrature, too rare to be drawn
    (SOFLOW, 0.544, 3e-4, None),  # 8.0e-6 by quadrature
    (Pair(of=LogitNormal(mean=-2.0, std=2.0), velocity_ratio=0), 0.35, 1.3e-2, 9e-3),  # MeanFlow, CIFAR-10
    (pair(-0.6, -4.0, 1.6), 0.40, None, 2.4e-2),
    (pair(-0.9, -4.0, 1.6), 0.35, 8e-3, 1.6e-2),
    (Beta(), 0.5, 3.4e-3, 1.7e-2),  # DuMo
    (Beta(a=0.8, b=1.0), 0.444, 4e-2, None),  # UCGM
    (Gap(), 0.686, 8.5e-2, 1.4e-3),  # TVM
    (LogitNormal(mean=-1.1 + log(2), std=2.0), 0.439, 4.7e-2, None),  # ECT: sigma / sd = t / (1 - t) is log-normal
    (Arctan(mean=-0.8, std=1.6, sd=1.0), 0.354, 1.8e-2, 4.9e-2),  # FACM
    (Below(of=Uniform()), 0.5, 5e-2, 5.3e-3),  # RCGM
]


@pytest.mark.parametrize(("law", "mean", "late", "far"), TABLE)
def test_where_laws_put_their_rows(law: Times, mean: float, late: float | None, far: float | None) -> None:
    """To the two digits that the table has, and five standard errors."""
    t, r = draws(law)
    assert abs(t.mean() - mean) < 5e-3 + NOISE
    for share, told in (((t > 0.95).double().mean(), late), ((t - r > 0.9).double().mean(), far)):
        if told is not None:
            assert abs(share - told) < 0.07 * told + 5 * sqrt(told / N)


def test_pairs_with_laws_of_their_own() -> None:
    """t, r and the t of rows at rest each keep their law; r is t where it is drawn above."""
    law = SOFLOW.model_copy(update={"velocity_ratio": 0.5, "flow": LogitNormal(mean=-0.2)})
    (t, r), moving = draws(law), torch.tensor(law.moving(N))
    assert uniform(normal((t[moving].logit() - 0.2) / 0.8))
    assert uniform(normal(t[~moving].logit() + 0.2))
    assert torch.equal(t[~moving], r[~moving])
    above = normal(torch.tensor(-1.2 / (0.8 * sqrt(2))))  # P(r > t), as they are drawn
    assert abs((t == r)[moving].double().mean() - above) < 2 * NOISE
    low = r[moving][t[moving] > 0.9].logit()  # hardly ever cut off
    assert abs(low.mean() + 1) < 5 * 0.8 / sqrt(len(low))


@pytest.mark.slow
@pytest.mark.parametrize(("rest", "data"), [(0.5, 0.5), (0.75, 0.8), (0.0, 0.25), (0.5, 1.0), (0.6, 0.0)])
def test_jumps_are_of_three_kinds(rest: float, data: float) -> None:
    """Their shares are exact, and each keeps its law."""
    law = Jumps(of=Uniform(high=0.9), velocity_ratio=rest, data_ratio=data)
    (t, r), moving = draws(law), torch.tensor(law.moving(N))
    assert torch.equal(t[~moving], r[~moving])
    assert (r < t)[moving].all()
    assert abs(moving.double().mean() - (1 - rest)) < 1e-5
    far = moving & (r == 0)
    assert abs(far.double().mean() - (1 - rest) * data) < 1e-5
    between = moving & ~far
    for kind in (~moving, far, between):
        if kind.any():
            assert uniform(t[kind] / 0.9)
    if between.any():
        assert uniform((r / t)[between])
        assert abs(torch.corrcoef(torch.stack([t, r / t])[:, between])[0, 1]) < 2 * NOISE


def test_jumps_are_evenly_spread() -> None:
    """Any eight neighbours have four rows at rest, two jumps to the data and two others."""
    t, r = Jumps()(64, stream(7))
    kinds = [(r == t).int(), ((r == 0) & (t > 0)).int(), ((r > 0) & (r < t)).int()]
    for kind, share in zip(kinds, (4, 2, 2), strict=True):
        assert (kind.unfold(0, 8, 1).sum(1) == share).all()


def test_below_is_uniform_below_t() -> None:
    t, r = draws(Below(of=Beta()))
    assert uniform(r / t)
    assert abs(torch.corrcoef(torch.stack([t, r / t]))[0, 1]) < NOISE


def test_gaps_and_the_times_below_them() -> None:
    """t - r is logit-normal, and so is r, but for what lies above 1 - (t - r)."""
    t, r = draws(Gap())
    assert uniform(normal((t - r).clamp(min=1e-7).logit() + 0.8))
    share = normal(r.logit() + 0.4) / normal((1 - (t - r)).clamp(max=1 - 1e-7).logit() + 0.4)
    assert uniform(share.clamp(max=1))
    assert abs(torch.corrcoef(torch.stack([t - r, share]))[0, 1]) < NOISE


class Coarse(Dyadic):
    """Few steps, on every second row."""

    levels: ClassVar[int] = 3
    every: ClassVar[int] = 2


@pytest.mark.parametrize("law", [Dyadic(), Coarse()])
def test_dyadic_steps_are_on_their_own_grid(law: Dyadic) -> None:
    """Steps of 2^-k from a multiple of 2^-k, all k as often and all places of a k; the others on the finest grid."""
    levels, every = law.levels, law.every
    (t, r), moving = draws(law), torch.tensor(law.moving(N))
    assert moving.sum() == -(-N // every)
    assert torch.equal(t[~moving], r[~moving])
    fine = t[~moving] * 2**levels
    assert torch.equal(fine, fine.round())
    assert fine.min() == 1
    assert fine.max() == 2**levels
    step = (t - r)[moving]
    k = -step.log2()
    assert torch.equal(k, k.round())
    place = t[moving] / step
    assert torch.equal(place, place.round())
    for level in range(levels):
        of = place[k == level]
        assert abs(len(of) / len(k) - 1 / levels) < NOISE * sqrt(every)
        assert set(of.unique().tolist()) == set(range(1, 2**level + 1))
        assert abs(of.mean() / 2**level - (1 + 2**-level) / 2) < NOISE * sqrt(every * levels)


def test_groups_share_their_times() -> None:
    law = Groups(of=Below(of=Uniform()))
    t, r = law(10, stream(5))
    for s in (t, r):
        assert len(s[:4].unique()) == len(s[4:8].unique()) == len(s[8:].unique()) == 1
        assert len(s.unique()) == 3
    t, r = (s[::4] for s in draws(law))
    assert uniform(t)
    assert uniform(r / t)


def test_karras_is_uniform_in_the_seventh_root_of_the_level() -> None:
    t, _ = draws(Karras())
    root = (0.5 * t / (1 - t)) ** (1 / 7)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert uniform((root - low) / (high - low))


def test_arctan_is_a_normal_level_as_an_angle() -> None:
    t, _ = draws(Arctan(mean=-1.0, std=1.4, sd=0.5))
    level = (t * pi / 2).tan()
    assert uniform(normal(((level * 0.5).log() + 1) / 1.4))
    linear = level / (1 + level)  # the same noise on the linear path
    assert abs(linear.mean() - 0.444) < NOISE
    assert abs((linear > 0.95).double().mean() - 1.0e-2) < 1e-3


@pytest.mark.parametrize(("share", "at"), [(0.15, 1.0), (0.5, 1.0), (0.15, 0.25)])
def test_an_atom_is_a_share_of_the_rows(share: float, at: float) -> None:
    t, _ = draws(Atom(of=Uniform(), share=share, at=at))
    there = t == at
    assert abs(there.double().mean() - share) < 1e-5
    assert uniform(t[~there])


def test_dyadic_steps_leave_the_others_to_a_law_of_their_own() -> None:
    law = Dyadic(flow=LogitNormal(mean=-0.4, std=1.0))
    (t, r), moving = draws(law), torch.tensor(law.moving(N))
    assert torch.equal(t[~moving], r[~moving])
    assert uniform(normal(t[~moving].logit() + 0.4))
    (t, _), (plain, _) = (some(N, stream(5)) for some in (law, Dyadic()))
    assert torch.equal(t[moving], plain[moving])
