"""Moments: exact under any split, in any order."""

import pytest
import torch

from dumo.evaluation.distance import Moments
from dumo.runtime.random import stream
from dumo.types import UserError


def rows(n: int, d: int = 5) -> torch.Tensor:
    return 100 + torch.randn(n, d, generator=stream("moments", n), dtype=torch.float64)  # far from 0: sums would cancel


def test_of_is_mean_and_unbiased_covariance() -> None:
    x = rows(40)
    moments = Moments.of(x)
    assert moments.count == 40
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.covariance, x.T.cov(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (20, 20), (0, 7, 1, 0, 25, 7), (1,) * 40])
def test_any_split_merges_to_the_whole(sizes: tuple[int, ...]) -> None:
    x = rows(40)
    parts = [Moments.of(part) for part in x.split(list(sizes))]
    for order in (parts, parts[::-1]):
        merged = sum(order[1:], start=order[0])
        whole = Moments.of(x)
        assert merged.count == whole.count
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-11)


def test_float32_rows_are_summed_in_float64() -> None:
    x = rows(1000).float()
    assert Moments.of(x).scatter.dtype == torch.float64
    torch.testing.assert_close(Moments.of(x).covariance, x.double().T.cov(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [0, 1])
def test_no_covariance_of_one_row(n: int) -> None:
    with pytest.raises(UserError, match=f"2 rows or more, here are {n}"):
        _ = Moments.of(rows(n)).covariance
