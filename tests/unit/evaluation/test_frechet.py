"""The Fréchet distance against closed forms that need no matrix root."""

import pytest
import torch
from torch import Tensor

from dumo.evaluation.distance import Moments, frechet_distance
from dumo.runtime.random import stream
from dumo.types import UserError

COUNT = 1000


def gaussian(mean: Tensor, covariance: Tensor, count: int = COUNT) -> Moments:
    return Moments(count, mean, covariance * (count - 1))


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=stream("frechet", key), dtype=torch.float64)


def rotation(d: int, key: str) -> Tensor:
    return torch.linalg.qr(randn(d, d, key=key)).Q


def covariance(d: int, key: str) -> Tensor:
    root = randn(d, d, key=key)
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2, 7, 32])
def test_common_axes(d: int) -> None:
    """With the same axes the roots subtract: |mu_1 - mu_2|^2 + sum (sqrt l_1 - sqrt l_2)^2."""
    q, m, n = rotation(d, "q"), randn(d, key="m"), randn(d, key="n")
    sd, other = randn(d, key="sd").abs() + 0.1, randn(d, key="other").abs() + 0.1
    expected = (m - n).square().sum() + (sd - other).square().sum()
    a, b = gaussian(m, (q * sd**2) @ q.T), gaussian(n, (q * other**2) @ q.T)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_different_axes() -> None:
    """For 2x2 matrices tr (S T)^1/2 = (tr S T + 2 sqrt det S T)^1/2."""
    s, t, m = covariance(2, "s"), covariance(2, "t"), randn(2, key="m")
    assert not torch.allclose(s @ t, t @ s)
    product = ((s @ t).trace() + 2 * torch.linalg.det(s @ t).sqrt()).sqrt()
    expected = m.square().sum() + s.trace() + t.trace() - 2 * product
    assert frechet_distance(gaussian(m, s), gaussian(0 * m, t)) == pytest.approx(expected.item(), rel=1e-9)


def mirrored(rows: Tensor) -> Tensor:
    """A reflection of every row: it mixes all coordinates, at less cost than a random rotation."""
    v = randn(rows.shape[1], key="mirror")
    return rows - 2 * torch.outer(rows @ v, v) / v.square().sum()


@pytest.mark.parametrize("sizes", [(400,), (133, 1, 266), (50,) * 8])
def test_merged_rows_against_the_closed_form(sizes: tuple[int, ...]) -> None:
    """Rows mean +- a_i q_i along common axes q have an exact mean, and variances 2 a_i^2 / (n - 1)."""
    d = sum(sizes) // 2
    q, scale, merged = mirrored(torch.eye(d, dtype=torch.float64)), (2 / (2 * d - 1)) ** 0.5, list[Moments]()
    means, lengths = [randn(d, key=f"m{i}") for i in "ab"], [randn(d, key=f"l{i}").abs() + 0.01 for i in "ab"]
    for mean, a in zip(means, lengths, strict=True):
        rows = torch.cat([mean + a[:, None] * q, mean - a[:, None] * q])
        rows = rows[torch.randperm(2 * d, generator=stream("frechet", "order"))]
        parts = [Moments.of(part) for part in rows.split(list(sizes))]
        merged.append(sum(parts[1:], start=parts[0]))
    expected = (means[0] - means[1]).square().sum() + (scale * (lengths[0] - lengths[1])).square().sum()
    assert frechet_distance(*merged) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("d", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_as_wide_as_inception(d: int) -> None:
    """No axis in common: pairs of coordinates, each with its closed form, mixed by one reflection."""
    roots = (randn(d // 2, 2, 2, key=key) for key in "st")
    s, t = (root @ root.mT + 0.1 * torch.eye(2, dtype=torch.float64) for root in roots)
    product = ((s @ t).diagonal(dim1=1, dim2=2).sum(1) + 2 * torch.linalg.det(s @ t).sqrt()).sqrt().sum()
    m = randn(d, key="m")
    expected = m.square().sum() + sum(c.diagonal(dim1=1, dim2=2).sum() for c in (s, t)) - 2 * product
    mixed = (mirrored(mirrored(torch.block_diag(*c)).T) for c in (s, t))
    a, b = (gaussian(mean, c, 50_000) for mean, c in zip((m, 0 * m), mixed, strict=True))
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_laws_of_a_squared_distance() -> None:
    a, b = (gaussian(randn(6, key=f"m{i}"), covariance(6, f"s{i}")) for i in "ab")
    q, far = rotation(6, "turn"), frechet_distance(a, b)
    assert far > 1
    assert frechet_distance(b, a) == pytest.approx(far, rel=1e-9)
    turned = (gaussian(q @ g.mean + 3, q @ g.covariance @ q.T) for g in (a, b))
    assert frechet_distance(*turned) == pytest.approx(far, rel=1e-9)
    doubled = (gaussian(2 * g.mean, 4 * g.covariance) for g in (a, b))
    assert frechet_distance(*doubled) == pytest.approx(4 * far, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("i", range(5))
def test_never_negative_and_none_to_itself(scale: float, i: int) -> None:
    """Also where features are dead or copies of each other, so that eigenvalues are 0 up to rounding."""
    x = scale * randn(50, 6, key=str(i))
    x[:, 4], x[:, 5] = x[:, 0], 0
    same = Moments.of(x)
    assert 0 <= frechet_distance(same, same) <= 1e-12 * same.covariance.trace()
    assert 0 <= frechet_distance(same, Moments.of(x.flip(0))) <= 1e-12 * same.covariance.trace()
    assert frechet_distance(same, Moments.of(x + scale)) == pytest.approx(6 * scale**2, rel=1e-6)  # sqrt of rounding


def test_as_many_rows_as_features_are_refused() -> None:
    enough, few = Moments.of(randn(9, 8, key="9")), Moments.of(randn(8, 8, key="8"))
    assert frechet_distance(enough, enough) >= 0
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(UserError, match=r"8 samples .* 8 features.*give more samples"):
            frechet_distance(*pair)
