"""Pairs: their order, and the exact number of rows at r = t. Distributions are in tests/theory/test_law.py."""

import pytest
import torch

from contract.case import kind, members
from dumo.flow.times import Beta, Jumps, LogitNormal, Pair, Times, Uniform
from dumo.runtime.random import stream

RATIOS = [0.0, 0.1, 0.2, 0.25, 0.29, 1 / 3, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9, 1.0]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n", [1, 7, 60, 100, 128, 1000, 4099])
def test_share_of_rows_without_a_step_is_exact(ratio: float, n: int) -> None:
    """0.29 of 100 is 28.999999999999996 to a computer."""
    t, r = Pair(velocity_ratio=ratio)(n, stream(0))
    assert (t == r).sum() == int(ratio * n + 1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_rows_without_a_step_are_evenly_spread(ratio: float) -> None:
    """Any run of rows, so any rank and any slice of accumulation, has its share within one row."""
    t, r = Pair(velocity_ratio=ratio)(240, stream(1))
    so_far = torch.cat([torch.zeros(1), (t == r).cumsum(0)])
    for length in (1, 2, 15, 60, 120, 240):
        inside = so_far[length:] - so_far[:-length]
        assert (inside - ratio * length).abs().max() < 1 + 1e-6


@pytest.mark.parametrize("ratio", RATIOS)
def test_moving_rows_are_those_with_a_step(ratio: float) -> None:
    """By place alone: of fewer rows, the first ones; and the same whatever is drawn."""
    law = Pair(velocity_ratio=ratio)
    for seed in range(3):
        t, r = law(100, stream(seed))
        assert law.moving(100) == tuple((r < t).tolist())
    assert law.moving(100)[:37] == law.moving(37)


def test_rows_with_a_step_do_not_depend_on_the_ratio() -> None:
    """So that runs at two ratios see the same times."""
    (t, r), (t_half, r_half) = (Pair(velocity_ratio=ratio)(100, stream(2)) for ratio in (0, 0.5))
    assert torch.equal(t, t_half)
    assert torch.equal(r_half, torch.where(t_half == r_half, t, r))
    assert (t > r).all()


@pytest.mark.parametrize("of", [Beta(a=2, b=3), Uniform(low=0.2, high=0.4), LogitNormal(mean=-2, std=2)])
def test_pairs_take_any_law_of_one_time(of: Times) -> None:
    g, again = stream(3), stream(3)
    t, r = Pair(of=of, velocity_ratio=0)(50, g)
    (a, _), (b, _) = of(50, again), of(50, again)
    assert torch.equal(t, a.maximum(b))
    assert torch.equal(r, a.minimum(b))


@pytest.mark.parametrize("law", [cls() for cls in members(Times)], ids=kind)
def test_the_generator_decides(law: Times) -> None:
    one, two, other = law(20, stream(4)), law(20, stream(4)), law(20, stream(5))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.isclose(one[0], other[0]).all()


LAWS = [*(cls() for cls in members(Times)), Jumps(data_ratio=1), Jumps(both_ways=True)]


@pytest.mark.parametrize("law", LAWS, ids=kind)
def test_a_law_says_whether_jumps_end_before_the_data(law: Times) -> None:
    t, r = law(960, stream(0))
    assert bool(((r > 0) & (r != t)).any()) is law.between


@pytest.mark.parametrize("a", [0.01, 0.05, 0.5])
def test_a_sharp_beta_stays_a_number(a: float) -> None:
    """Gamma variables of small shape underflow; their ratio must not be 0 / 0."""
    t, _ = Beta(a=a, b=a)(100_000, stream(6))
    assert t.isfinite().all()
    assert abs(t.mean() - 0.5) < 0.01


def test_both_ways_exchanges_the_times_of_every_second_row_of_a_kind() -> None:
    law = Jumps(of=Uniform(), velocity_ratio=0.25)
    both = law.model_copy(update={"both_ways": True})
    (t, r), (t_both, r_both) = (one(96, stream(0)) for one in (law, both))
    up = r_both > t_both
    assert torch.equal(torch.where(up, r_both, t_both), t)
    assert torch.equal(torch.where(up, t_both, r_both), r)
    for rows in ((r < t) & (r == 0), (r < t) & (r > 0)):
        assert up[rows].float().mean() == 0.5
    assert (both.climbs, law.climbs) == (True, False)
    assert both.moving(96) == law.moving(96)
    assert "both_ways" not in law.model_dump()
