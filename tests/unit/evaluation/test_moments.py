"""Moments: exact under any split, in any order."""

import pytest
import torch

from dumo.evaluation.distance import Moments
from dumo.runtime.random import stream


def rows(n: int, d: int = 5) -> torch.Tensor:
    return 100 + torch.randn(n, d, generator=stream("moments", n), dtype=torch.float64)  # far from 0: sums would cancel


def test_of_is_mean_and_unbiased_covariance() -> None:
    x = rows(40)
    moments = Moments.of(x)
    assert moments.count == 40
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.covariance, x.T.cov(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (20, 20), (7, 1, 0, 25, 7), (1,) * 40])
def test_any_split_merges_to_the_whole(sizes: tuple[int, ...]) -> None:
    x = rows(40)
    parts = [Moments.of(part) for part in x.split(list(sizes))]
    for order in (parts, parts[::-1]):
        merged = sum(order[1:], start=order[0])
        whole = Moments.of(x)
        assert merged.count == whole.count
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-11)


def test_merge_does_not_depend_on_brackets() -> None:
    a, b, c = (Moments.of(part) for part in rows(30).split(10))
    torch.testing.assert_close(((a + b) + c).scatter, (a + (b + c)).scatter, rtol=1e-12, atol=1e-11)


def test_no_rows_change_nothing() -> None:
    whole, nothing = Moments.of(rows(10)), Moments.of(rows(0))
    for merged in (whole + nothing, nothing + whole):
        assert merged.count == 10
        assert torch.equal(merged.mean, whole.mean)
        assert torch.equal(merged.scatter, whole.scatter)


def test_float32_rows_are_summed_in_float64() -> None:
    x = rows(1000).float()
    assert Moments.of(x).scatter.dtype == torch.float64
    torch.testing.assert_close(Moments.of(x).covariance, x.double().T.cov(), rtol=1e-12, atol=1e-14)
