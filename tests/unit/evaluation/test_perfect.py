"""What a perfect sampler would have: the score of new samples of the law itself, found from rows of the data alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dumo.evaluation import mmd
from dumo.evaluation.estimate import mean_sd
from dumo.evaluation.frechet import Moments, frechet_distance
from dumo.evaluation.mmd import (
    MIN_ROWS_PER_FEATURE,
    NullDistance,
    kid,
    measure_null_distance,
    random_parts,
    subset_scale,
)
from dumo.evaluation.two_sample import auc_sd, two_sample_auc
from dumo.runtime.random import stream

SD = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.5, 0.2], dtype=torch.float64)  # of a Gaussian of six features
N, M = 300, 700  # samples, and rows of the reference
CENTRES = 4 * torch.randn(3, 6, generator=stream("centres"), dtype=torch.float64)  # of three classes


def rows(count: int, *key: object, classes: bool = False) -> Tensor:
    """Of the Gaussian, or of three of them, in turn."""
    x = SD * torch.randn(count, 6, generator=stream("rows", count, *key), dtype=torch.float64)
    return x + CENTRES[torch.arange(count) % 3] if classes else x


def frechet(x: Tensor, y: Tensor) -> float:
    return frechet_distance(Moments.of(x), Moments.of(y))


def found(
    x: Tensor,
    c: Tensor,
    distance: Callable[[Tensor, Tensor], float] = frechet,
    min_part_rows: float = MIN_ROWS_PER_FEATURE * 6,
) -> NullDistance:
    null = measure_null_distance(c, lambda a, b: distance(x[a], x[b]), kind="test", min_part_rows=min_part_rows)
    assert null is not None
    return null


def scored(distance: Callable[[Tensor, Tensor], float], *, classes: bool = False) -> tuple[float, float]:
    """Mean and spread of what new samples have against new references."""
    return mean_sd([distance(rows(N, i, classes=classes), rows(M, -1 - i, classes=classes)) for i in range(200)])


def test_the_bias_of_a_gaussian_is_the_exact_one() -> None:
    """To first order, for moments of n rows: of the mean tr S / n, of the root of S the rest (Dowson & Landau)."""
    variance = SD**2
    pairs = torch.outer(variance, variance) / (variance + variance[:, None])
    exact = variance.sum() + pairs.sum() / 2 + pairs.trace() / 2
    null = found(rows(6000, "real"), torch.zeros(6000))
    assert null.mean == pytest.approx(exact.item(), rel=0.08)
    assert null.scaled_to(N, M)[0] == pytest.approx(exact.item() * (1 / N + 1 / M), rel=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [False, True], ids=["no classes", "classes in turn"])
def test_new_samples_of_the_law_score_as_a_perfect_sampler(*, classes: bool) -> None:
    """With classes parts have their share of each: what is between the classes does not count."""
    c = torch.arange(2400) % 3 if classes else torch.zeros(2400, dtype=torch.long)
    real = rows(2400, "real", classes=classes)
    (null_mean, null_sd), (mean, sd) = found(real, c).scaled_to(N, M), scored(frechet, classes=classes)
    assert null_mean == pytest.approx(mean, rel=0.12)
    assert null_sd == pytest.approx(sd, rel=0.35)
    assert found(real, 0 * c).mean > (2 if classes else 0) * found(real, c).mean


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """That of `kid`, between all rows."""
    return mmd._unbiased(x.double(), y.double(), mmd._cubic_kernel)


@pytest.mark.nightly
def test_kernel_distances_in_subsets() -> None:
    """Unbiased: about 0 without classes; and the mean over subsets scatters more than one of all rows."""
    null = found(rows(2400, "real"), torch.zeros(2400), kernel_distance, 2.0)
    draws = stream("subsets")

    def by_subsets(x: Tensor, y: Tensor) -> float:
        return kid(x, y, subsets=4, subset_size=100, generator=draws)[0]

    assert abs(null.mean) < 3 * null.sd / 60**0.5
    of_subsets = 0.0, null.scaled_to(N, M, subset_scale(4, 100))[1]
    for distance, (null_mean, null_sd) in ((kernel_distance, null.scaled_to(N, M)), (by_subsets, of_subsets)):
        mean, sd = scored(distance)
        assert null_mean == pytest.approx(mean, abs=0.3 * sd)
        assert null_sd == pytest.approx(sd, rel=0.35)


@pytest.mark.slow
def test_subsets_that_are_small_beside_the_parts_do_not_widen_the_spread() -> None:
    """A distance over subsets of 24 scatters fifty times as far as one of all rows of a part of 1,200."""
    draws = stream("small subsets")

    def by_subsets(x: Tensor, y: Tensor) -> float:
        return kid(x, y, subsets=25, subset_size=24, generator=draws)[0]

    real = rows(2400, "real")
    null = measure_null_distance(
        torch.zeros(2400),
        lambda a, b: by_subsets(real[a], real[b]),
        kind="test",
        min_part_rows=24.0,
        scale=subset_scale(25, 24),
    )
    assert null is not None
    _, sd = scored(by_subsets)
    assert null.scaled_to(N, M, subset_scale(25, 24))[1] == pytest.approx(sd, rel=0.25)


def test_the_area_of_one_row_and_another_is_0_or_1() -> None:
    assert auc_sd(2, 2) == 0.5


@pytest.mark.nightly
def test_an_area_scatters_about_a_half() -> None:
    areas = [two_sample_auc(rows(120, i), rows(200, -1 - i), stream("auc", i)) for i in range(100)]
    mean, sd = mean_sd(areas)
    assert mean == pytest.approx(0.5, abs=0.02)
    assert auc_sd(200, 120) == auc_sd(120, 200) == pytest.approx(sd, rel=0.2)


def test_parts_are_disjoint_and_alike_and_too_few_tell_nothing() -> None:
    c = torch.cat([torch.zeros(40), torch.ones(9), torch.full((1,), 2)]).long()[
        torch.randperm(50, generator=stream("c"))
    ]
    some = random_parts(c, 4, stream("parts"))
    assert torch.cat(some).sort()[0].equal(torch.arange(50))
    assert {len(one) for one in some} == {12, 13}
    assert all(c[one].bincount(minlength=2)[1] in (2, 3) for one in some)
    assert measure_null_distance(c, lambda a, b: 0.0, kind="test", min_part_rows=12.0) == NullDistance(0.0, 0.0)
    assert measure_null_distance(c, lambda a, b: 0.0, kind="test", min_part_rows=13.0) is None
