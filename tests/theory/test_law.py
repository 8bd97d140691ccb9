"""Laws of time against their closed forms: moments, distribution functions and shares."""

from math import comb, erf, log, sqrt

import pytest
import torch
from torch import Tensor

from contract.case import members
from dumo.flow.draw import stream
from dumo.flow.times import Beta, Level, LogitNormal, Noise, Pair, Times, Uniform

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


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.5)])
def test_moments_of_uniform(low: float, high: float) -> None:
    t, _ = draws(Uniform(low=low, high=high))
    assert abs(t.mean() - (low + high) / 2) < NOISE
    assert abs(t.var() - (high - low) ** 2 / 12) < NOISE / 2
    assert low <= t.min() < low + 1e-3
    assert high - 1e-3 < t.max() <= high


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


def test_rows_at_one_time_keep_the_law_of_the_larger() -> None:
    """r moves up to t, not t down to r (MeanFlow's own code)."""
    t, r = draws(Pair(of=Uniform(), velocity_ratio=0.5))
    same = t == r
    assert abs(same.double().mean() - 0.5) < 1e-9
    assert abs(t[same].mean() - 2 / 3) < 2 * NOISE
    assert abs(t[~same].mean() - 2 / 3) < 2 * NOISE
    assert abs(r[~same].mean() - 1 / 3) < 2 * NOISE


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_rows_said_to_rest_rest_and_the_others_move(ratio: float) -> None:
    """What a derivative is spared for: u* = v* - (t - r) du/dt forgets it at r = t, and nowhere else."""
    law = Pair(of=Uniform(), velocity_ratio=ratio)
    t, r = draws(law)
    moving = torch.tensor(law.moving(N))
    assert (t == r)[~moving].all()
    assert (t > r)[moving].double().mean() > 1 - 1e-5  # two of 2^24 numbers may be one
    assert abs(moving.double().mean() - (1 - ratio)) < 1e-9


@pytest.mark.parametrize("law", [cls() for cls in members(Times)])
def test_times_are_in_order_and_in_the_unit_interval(law: Times) -> None:
    t, r = draws(law)
    assert t.shape == r.shape == (N,)
    assert (r >= 0).all()
    assert (r <= t).all()
    assert (t <= 1).all()
    assert t.std() > 0.05
    if not isinstance(law, Pair):
        assert not r.any()


def test_other_laws() -> None:
    noise = Noise()(torch.Size((1000, 3, 5)), stream(1)).double()
    assert noise.shape == (1000, 3, 5)
    assert abs(noise.mean()) < 5 / sqrt(15_000)
    assert abs(noise.square().mean() - 1) < 8 / sqrt(15_000)

    flat = Level(low=2, high=6)(torch.Size((N, 3)), stream(2)).double()
    assert flat.shape == (N,)
    assert abs(flat.mean() - 4) < 4 * NOISE
    assert abs(flat.var() - 16 / 12) < 4 * NOISE

    steep = Level(low=1, high=8, log=True)(torch.Size((N, 3)), stream(3)).double().log()
    assert abs(steep.mean() - log(8) / 2) < 3 * NOISE
    assert steep.min() >= 0
    assert steep.max() <= log(8) + 1e-6
