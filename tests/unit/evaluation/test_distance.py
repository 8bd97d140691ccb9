"""Distances of features against closed forms and sums as they are written; moments and scores exact in any batches."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dumo.evaluation import mmd
from dumo.evaluation.frechet import Moments, frechet_distance, pixel_frechet, reduce_pixels
from dumo.evaluation.inception_score import InceptionScore
from dumo.evaluation.mmd import kid, mmd2, null_spread
from dumo.evaluation.two_sample import two_sample_auc
from dumo.runtime.random import stream

D = torch.float64
WIDTHS = (0.1, 0.5, 2.0)
K = 7  # classes of the score
each_split = pytest.mark.parametrize("sizes", [(60,), (1, 59), (30, 30), (0, 13, 1, 0, 26, 20), (1,) * 60])


def randn(*shape: int, key: object) -> Tensor:
    return torch.randn(shape, generator=stream("distance", str(key)), dtype=D)


def logits(n: int) -> Tensor:
    return 3 * torch.randn(n, K, generator=stream("score", n))


def auc(real: Tensor, fake: Tensor) -> float:
    return two_sample_auc(real, fake, stream("auc"))


# Moments, and the Fréchet distance of them.


def test_moments_are_mean_and_unbiased_covariance() -> None:
    """In float64, where sums of float32 far from 0 would cancel."""
    for x in (100 + randn(40, 5, key="rows"), (100 + randn(1000, 5, key="many")).float()):
        moments = Moments.of(x)
        assert moments.count == len(x)
        assert moments.scatter.dtype == D
        torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(moments.covariance, x.double().T.cov(), rtol=1e-12, atol=1e-14)


@each_split
def test_moments_of_any_split_merge_to_the_whole(sizes: tuple[int, ...]) -> None:
    x = 100 + randn(60, 5, key="rows")
    parts, whole = [Moments.of(part) for part in x.split(list(sizes))], Moments.of(x)
    for order in (parts, parts[::-1]):
        merged = sum(order[1:], start=order[0])
        assert merged.count == whole.count
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-12, atol=1e-11)


def gaussian(mean: Tensor, covariance: Tensor, count: int = 1000) -> Moments:
    return Moments(count, mean, covariance * (count - 1))


def rotation(d: int, key: str) -> Tensor:
    return torch.linalg.qr(randn(d, d, key=key)).Q


def covariance(d: int, key: str) -> Tensor:
    root = randn(d, d, key=key)
    return root @ root.T + 0.1 * torch.eye(d, dtype=D)


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
    q, scale, merged = mirrored(torch.eye(d, dtype=D)), (2 / (2 * d - 1)) ** 0.5, list[Moments]()
    means, lengths = [randn(d, key=f"m{i}") for i in "ab"], [randn(d, key=f"l{i}").abs() + 0.01 for i in "ab"]
    for mean, a in zip(means, lengths, strict=True):
        rows = torch.cat([mean + a[:, None] * q, mean - a[:, None] * q])
        rows = rows[torch.randperm(2 * d, generator=stream("frechet", "order"))]
        parts = [Moments.of(part) for part in rows.split(list(sizes))]
        merged.append(sum(parts[1:], start=parts[0]))
    expected = (means[0] - means[1]).square().sum() + (scale * (lengths[0] - lengths[1])).square().sum()
    assert frechet_distance(*merged) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("d", [256, pytest.param(2048, marks=pytest.mark.nightly)])
def test_as_wide_as_inception(d: int) -> None:
    """No axis in common: pairs of coordinates, each with its closed form, mixed by one reflection."""
    roots = (randn(d // 2, 2, 2, key=key) for key in "st")
    s, t = (root @ root.mT + 0.1 * torch.eye(2, dtype=D) for root in roots)
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
    x = scale * randn(50, 6, key=i)
    x[:, 4], x[:, 5] = x[:, 0], 0
    same = Moments.of(x)
    assert 0 <= frechet_distance(same, same) <= 1e-12 * same.covariance.trace()
    assert 0 <= frechet_distance(same, Moments.of(x.flip(0))) <= 1e-12 * same.covariance.trace()
    assert frechet_distance(same, Moments.of(x + scale)) == pytest.approx(6 * scale**2, rel=1e-6)  # sqrt of rounding


def crossed(mean: Tensor, sd: Tensor) -> Tensor:
    """Images mean +- sd_i e_i, in pairs: their mean is exact, and pixel i has variance 2 sd_i^2 / (2 d - 1), alone."""
    d = mean.numel()
    steps = torch.diag(sd.flatten())
    return (mean.flatten() + torch.cat([steps, -steps])).view(2 * d, *mean.shape)


def test_pixels_that_do_not_covary() -> None:
    """Their distance is |m - n|^2 + sum (s_i - t_i)^2."""
    m, n, s, t = torch.rand(4, 1, 8, 8, generator=stream("pixel"), dtype=D)
    expected = (m - n).square().sum() + (s - t).square().sum() * 2 / (2 * 64 - 1)
    assert pixel_frechet(crossed(m, s), crossed(n, t)) == pytest.approx(expected.item(), rel=1e-9)


def test_images_are_reduced_to_means_of_areas() -> None:
    """Enlarging pixel by pixel is undone, so sets at other sizes are compared; detail inside a square is not seen."""
    x = torch.rand(5, 3, 4, 4, generator=stream("areas"), dtype=D)
    large = x.repeat_interleave(16, 2).repeat_interleave(16, 3)
    checks = torch.ones(64, 64, dtype=D)
    checks[::2, 1::2], checks[1::2, ::2] = -1, -1
    assert torch.allclose(reduce_pixels(large + checks, 4), x.flatten(1))
    assert torch.equal(reduce_pixels(x.float()), x.float().double().flatten(1))  # small ones stay as they are


# The Inception Score.


def direct(x: Tensor) -> float:
    """Salimans et al. 2016, as written."""
    p = x.double().softmax(1)
    return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()


def test_the_score_is_its_definition_per_full_split() -> None:
    """The last ten images are no split of twenty."""
    x = logits(50)
    mean, sd = InceptionScore.of(x, torch.arange(50), size=20, splits=3).value()
    parts = torch.tensor([direct(part) for part in x[:40].split(20)], dtype=D)
    assert mean == pytest.approx(parts.mean().item(), rel=1e-12)
    assert sd == pytest.approx(parts.std(correction=0).item(), rel=1e-10)


def test_extremes_of_the_score() -> None:
    """Sure and balanced: the number of classes. Always the same answer: 1, sure or not. One split has no sd."""
    sure = 1e4 * torch.eye(K).repeat(3, 1)  # softmax underflows to exact zeros
    for splits in (1, 4):
        found = InceptionScore.of(sure, torch.arange(len(sure)), size=100, splits=splits).value()
        assert found == (pytest.approx(K, rel=1e-12), None)
    for alike in (sure[:1], logits(1)):
        one = InceptionScore.of(alike.repeat(5, 1), torch.arange(5), size=5, splits=1).value()[0]
        assert one == pytest.approx(1, abs=1e-12)


@each_split
def test_scores_of_any_batches_in_any_order_merge_to_the_whole(sizes: tuple[int, ...]) -> None:
    x, order = logits(60), torch.randperm(60, generator=stream("order"))
    whole = InceptionScore.of(x, torch.arange(60), size=25, splits=3)
    parts = [InceptionScore.of(x[rows], rows, size=25, splits=3) for rows in order.split(list(sizes))]
    merged = sum(parts[1:], start=parts[0])
    assert torch.equal(merged.count, torch.tensor([25.0, 25, 10], dtype=D))
    torch.testing.assert_close(merged.mass, whole.mass, rtol=1e-12, atol=1e-14)
    assert merged.value() == pytest.approx(whole.value(), rel=1e-12)


# MMD^2 and the kernel distance, in blocks of bounded size.


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


@pytest.mark.parametrize("block", [1, 60, 10**6])
def test_mmd2_is_the_sum_over_pairs_wherever_they_are(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = randn(17, 2, key="x"), randn(13, 2, key="y") + 0.3
    wanted = by_hand(x, y, gauss)
    monkeypatch.setattr(mmd, "BLOCK", block)
    assert mmd2(x, y, WIDTHS) == pytest.approx(wanted, rel=1e-11)
    assert mmd2(x + 1e4, y + 1e4, WIDTHS) == pytest.approx(wanted, rel=1e-7)


def test_blocks_are_small_and_see_each_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spy(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a) * len(b))
        return torch.ones(len(a), len(b), dtype=a.dtype)

    monkeypatch.setattr(mmd, "BLOCK", 3000)
    found = mmd._unbiased(randn(300, 2, key="x"), randn(200, 2, key="y"), spy)
    assert found == pytest.approx(0, abs=1e-12)  # k = 1 sees nothing
    assert max(sizes) <= 3000


@pytest.mark.slow
def test_null_spread_is_that_of_full_draws() -> None:
    """Scaled from sets of 60 points to 300, and measured at 300; of fewer points than rows it needs no scale."""
    mean, sd = null_spread(lambda i: randn(300, 2, key=f"null {i}"), WIDTHS, 300, pairs=300, rows=60)
    direct = [mmd2(randn(300, 2, key=f"one {i}"), randn(300, 2, key=f"two {i}"), WIDTHS) for i in range(150)]
    assert sd == pytest.approx(statistics.stdev(direct), rel=0.2)
    assert abs(mean) < 4 * sd / math.sqrt(300)
    draw = [randn(40, 2, key=f"few {i}") for i in range(20)]
    values = [mmd2(draw[2 * i], draw[2 * i + 1], WIDTHS) for i in range(10)]
    expected = (statistics.mean(values), statistics.stdev(values))
    assert null_spread(draw.__getitem__, WIDTHS, 40, pairs=10) == pytest.approx(expected, rel=1e-11)


def test_kid_averages_over_the_subsets_it_draws() -> None:
    x, y = randn(30, 4, key="x"), randn(20, 4, key="y") + 0.3
    draws, values = stream("kid"), []
    for _ in range(5):
        rows, others = torch.randperm(30, generator=draws)[:8], torch.randperm(20, generator=draws)[:8]
        values.append(by_hand(x[rows], y[others], cubic))
    found = kid(x, y, subsets=5, subset_size=8, generator=stream("kid"))
    assert found == pytest.approx((statistics.mean(values), statistics.stdev(values)), rel=1e-10)


# A machine that tells two sets apart.


def test_one_law_is_chance_and_no_overlap_is_certain() -> None:
    """Chance whatever the sizes: rows that were learned are not asked about."""
    real = randn(300, 40, key="real")
    assert auc(real, randn(300, 40, key="fake")) == pytest.approx(0.5, abs=0.08)
    assert auc(real, randn(900, 40, key="many")) == pytest.approx(0.5, abs=0.08)
    assert auc(randn(50, 2, key="a"), randn(80, 2, key="b") + 100) == 1
    assert auc(randn(4, 2, key="a"), randn(4, 2, key="b") + 9) == 1


def test_the_best_test_and_what_no_line_divides() -> None:
    """Nothing orders Gaussians better than the likelihood: Phi(delta / sqrt 2) = 0.76 for delta = 1. A ring around its
    middle has the same mean, so it takes a kernel."""
    real, fake = randn(1500, 2, key="real"), randn(1500, 2, key="fake")
    assert auc(real, fake + torch.tensor([1.0, 0.0])) == pytest.approx(0.76, abs=0.03)
    assert auc(0.5 * real[:400], 3 * torch.nn.functional.normalize(fake[:400])) > 0.99


def test_it_repeats_and_takes_images() -> None:
    x, y = randn(40, 16, key="x"), randn(30, 16, key="y") + 0.3
    assert auc(x, y) == auc(x, y) == auc(x.view(40, 1, 4, 4), y.view(30, 1, 4, 4))


# Too few.


def test_one_row_more_than_features_is_enough() -> None:
    enough = Moments.of(randn(9, 8, key="9"))
    images = torch.rand(20, 3, 8, 8, generator=stream("few"))
    assert frechet_distance(enough, enough) >= 0
    assert pixel_frechet(images, images, side=2) == pytest.approx(0, abs=1e-12)
