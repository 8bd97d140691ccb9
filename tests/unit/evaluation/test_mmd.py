"""MMD^2 and the kernel distance: unbiased, equal to the sums as they are written, in blocks of bounded size."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dumo.evaluation import distance
from dumo.evaluation.distance import kid, mmd2, null_spread
from dumo.runtime.random import stream
from dumo.types import UserError

WIDTHS = (0.1, 0.5, 2.0)


def randn(n: int, *key: object, d: int = 2) -> Tensor:
    return torch.randn(n, d, generator=stream("kernel", *map(str, key)), dtype=torch.float64)


def gauss(a: Tensor, b: Tensor) -> float:
    square = (a - b).square().sum().item()
    return sum(math.exp(-square / (2 * w**2)) for w in WIDTHS) / len(WIDTHS)


def cubic(a: Tensor, b: Tensor) -> float:
    return (a.dot(b).item() / len(a) + 1) ** 3


def by_hand(x: Tensor, y: Tensor, k: Callable[[Tensor, Tensor], float]) -> float:
    """Gretton et al. 2012, Eq. 3, pair by pair."""
    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_mmd2_is_the_sum_over_pairs() -> None:
    x, y = randn(12, "x"), randn(9, "y") + 0.3
    assert mmd2(x, y, WIDTHS) == pytest.approx(by_hand(x, y, gauss), rel=1e-11)


@pytest.mark.parametrize("block", [1, 60, 10**6])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = randn(37, "x"), randn(23, "y") + 0.3
    whole = mmd2(x, y, WIDTHS)
    monkeypatch.setattr(distance, "BLOCK", block)
    assert mmd2(x, y, WIDTHS) == pytest.approx(whole, rel=1e-11)


def test_blocks_are_small_and_see_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spy(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a) * len(b))
        return torch.ones(len(a), len(b), dtype=a.dtype)

    monkeypatch.setattr(distance, "BLOCK", 3000)
    assert distance._unbiased(randn(300, "x"), randn(200, "y"), spy) == pytest.approx(
        0, abs=1e-12
    )  # k = 1 sees nothing
    assert max(sizes) <= 3000


def test_mmd2_does_not_see_where_the_points_are() -> None:
    x, y = randn(50, "x"), randn(50, "y") + 0.2
    assert mmd2(x + 1e4, y + 1e4, WIDTHS) == pytest.approx(mmd2(x, y, WIDTHS), rel=1e-7)


def test_null_spread_is_that_of_full_draws() -> None:
    """Scaled from sets of 60 points to 300, and measured at 300."""
    mean, sd = null_spread(lambda i: randn(300, "null", i), WIDTHS, 300, pairs=300, rows=60)
    direct = [mmd2(randn(300, "one", i), randn(300, "two", i), WIDTHS) for i in range(150)]
    assert sd == pytest.approx(statistics.stdev(direct), rel=0.2)
    assert abs(mean) < 4 * sd / math.sqrt(300)


def test_null_spread_of_fewer_points_than_rows_needs_no_scale() -> None:
    draw = [randn(40, "few", i) for i in range(20)]
    values = [mmd2(draw[2 * i], draw[2 * i + 1], WIDTHS) for i in range(10)]
    expected = (statistics.mean(values), statistics.stdev(values))
    assert null_spread(draw.__getitem__, WIDTHS, 40, pairs=10) == pytest.approx(expected, rel=1e-11)


def test_kid_averages_over_the_subsets_it_draws() -> None:
    x, y = randn(30, "x", d=4), randn(20, "y", d=4) + 0.3
    draws, values = stream("kid"), []
    for _ in range(5):
        rows, others = torch.randperm(30, generator=draws)[:8], torch.randperm(20, generator=draws)[:8]
        values.append(by_hand(x[rows], y[others], cubic))
    found = kid(x, y, subsets=5, subset_size=8, generator=stream("kid"))
    assert found == pytest.approx((statistics.mean(values), statistics.stdev(values)), rel=1e-10)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(UserError, match="2 points or more on each side, here are 1 and 5"):
        mmd2(randn(1, "x"), randn(5, "y"), WIDTHS)
    with pytest.raises(UserError, match="subsets of 6 rows do not fit in 9 and 5"):
        kid(randn(9, "x"), randn(5, "y"), subsets=2, subset_size=6, generator=stream("kid"))
