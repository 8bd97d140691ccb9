"""Distances between two sets of samples, or of features of them, and the sums that they are made of.

- Moments of a stream of rows, that merge. With the scatter S = sum_i (x_i - mean)(x_i - mean)^T, two disjoint parts
  a and b of a data set give n = n_a + n_b, delta = mean_b - mean_a, mean = mean_a + delta n_b / n and
  S = S_a + S_b + delta delta^T n_a n_b / n, an identity, so any split over batches or ranks gives the same moments up
  to rounding (Chan, Golub & LeVeque 1983).
- The Fréchet distance of two Gaussians (Dowson & Landau 1982), squared, as is the custom:
  d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1^1/2 S_2 S_1^1/2)^1/2. On features of Inception it is the FID
  (Heusel et al. 2017, Eq. 6); on any others it is named after those. On means over squares of pixels it sees the light,
  the colours and the coarse layout, no detail.
- MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), 0 exactly when the two laws are equal, for a Gaussian kernel. Leaving
  out the pairs of a point with itself makes the estimate unbiased (Gretton et al. 2012, Eq. 3), so it may be negative.
- The classifier two-sample test: a classifier learns one half of each set, and orders the other half. The area under
  its curve (AUC) is the chance that it puts a random fake behind a random real row: 0.5 of equal laws, 1 where the two
  never mix (Lopez-Paz & Oquab 2017, who count right answers instead; the area needs no threshold).
- The Inception Score of a split of images, exp mean_x KL(p(y | x) || p(y)) = exp(H[p(y)] - mean_x H[p(y | x)])
  (Salimans et al. 2016), from 1 (all answers alike) to the number of classes. It needs three sums: how many images,
  their p(y | x), and their entropies. A split of fewer images scores less: its size is part of the measure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Generator, Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.types import UserError

Real = Float[Tensor, "n *d"]
Fake = Float[Tensor, "m *d"]
Points = Float[Tensor, "n d"]
Images = Float[Tensor, "n c h w"]
Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, d), (m, d) -> (n, m)

SIDE = 8  # pixels: at most this many a side are compared. Ours
BLOCK = 2**19  # numbers per block of a kernel: 4 MB, about a processor's cache


@dataclass(frozen=True)
class Moments:
    """The first two moments of `count` rows of d numbers; no rows at all is the neutral element of `+`."""

    count: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]  # sum of the outer products of the deviations from the mean

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> "Moments":
        """The moments of these rows; n may be 0."""
        x = features.double()
        mean = x.sum(0) / max(len(x), 1)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together (Chan, Golub & LeVeque 1983)."""
        count = self.count + other.count
        share, delta = other.count / max(count, 1), other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * self.count * share
        return Moments(count, self.mean + delta * share, scatter)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance, scatter / (count - 1), of 2 rows or more."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """d^2 >= 0 in the square of the features' unit, in float64. Raises `UserError` where rows <= features.

    With n rows it is biased upwards, by about a constant over n: compare at equal n only.
    """
    width = len(a.mean)
    for moments in (a, b):
        if moments.count <= width:
            raise UserError(
                f"{moments.count} samples cannot give a covariance of {width} features:"
                f" a Fréchet distance needs more than {width}, give more samples, or set frechet to false and go by kid"
            )
    root = _root(a.covariance)
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * product
    return max(distance.item(), 0.0)  # of equal moments, rounding can leave less than nothing


def _root(s: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The symmetric root of a covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def pixel_frechet(x: Images, y: Float[Tensor, "m c _ _"], side: int = SIDE) -> float:
    """d^2 >= 0 between the Gaussians of the reduced pixels of x and y, in float64.

    Raises `UserError` where a side has no more images than numbers that are compared, c * side^2.
    """
    return frechet_distance(Moments.of(reduced(x, side)), Moments.of(reduced(y, side)))


def reduced(x: Images, side: int = SIDE) -> Float64[Tensor, "n d"]:
    """The images as rows of c * side^2 numbers, the means over areas; as they are where they are no larger."""
    height, width = (min(side, length) for length in x.shape[2:])
    small = [adaptive_avg_pool2d(part.double(), (height, width)) for part in x.cpu().split(256)]
    return torch.cat(small).flatten(1)


def mmd2(x: Points, y: Float[Tensor, "m d"], widths: Sequence[float]) -> float:
    """Unbiased MMD^2 of the mean of Gaussian kernels exp(-|a - b|^2 / 2 w^2) over the widths w > 0, in float64.

    Dimensionless, at most 2. There are 2 points or more on each side.
    """
    centre = y.double().mean(0)  # kernels see differences only, and small numbers cancel less
    return _unbiased(x.double() - centre, y.double() - centre, _gaussians(widths))


def null_spread(
    draw: Callable[[int], Points], widths: Sequence[float], count: int, *, pairs: int = 50, rows: int = 1000
) -> tuple[float, float]:
    """Mean and sd of `mmd2` between two independent sets of `count` points of one law: what is no difference.

    `draw(i)` gives the i-th independent set, of at least min(rows, count) points. Under the null n MMD^2 has a law
    that depends on n no more (Gretton et al. 2012, Theorem 12), so `pairs` pairs of sets of `rows` points, a hundredth
    of the work, scaled by rows / count, serve for `count`. The relative error of the sd is about 1 / sqrt(2 pairs).
    """
    size = min(rows, count)
    values = [mmd2(draw(2 * i)[:size], draw(2 * i + 1)[:size], widths) * size / count for i in range(pairs)]
    return mean_sd(values)


def kid(
    x: Points, y: Float[Tensor, "m d"], *, subsets: int, subset_size: int, generator: Generator
) -> tuple[float, float]:
    """Kernel distance of features: unbiased MMD^2 of (a.b / d + 1)^3 over random subsets, mean and sd over them.

    Binkowski et al. 2018 take Inception's features: with others, name them. Subsets overlap,
    so the sd tells the spread at their size, not the error of the mean. Raises `UserError` if a side has too few rows.
    """
    if subset_size > min(len(x), len(y)):
        raise UserError(f"subsets of {subset_size} rows do not fit in {len(x)} and {len(y)}: give more samples")
    a, b = x.double(), y.double()
    values = [
        _unbiased(pick(a, subset_size, generator), pick(b, subset_size, generator), _cubic) for _ in range(subsets)
    ]
    return mean_sd(values)


def kernel_distance(x: Points, y: Float[Tensor, "m d"]) -> float:
    """The kernel distance of `kid` between all of x and y."""
    return _unbiased(x.double(), y.double(), _cubic)


def gaussian_mmd(x: Points, y: Float[Tensor, "m d"], width: float) -> tuple[float, float]:
    """Unbiased MMD^2 of the kernel exp(-|a - b|^2 / 2 w^2), and its standard error, in float64.

    The error is that of means over x and over y of what each row adds, 4 (var_i(mean_j k(x_i, x_j) - mean_j k(x_i,
    y_j)) / n + the same of y / m). There are 2 points or more on each side.
    """
    n, m, kernel, centre = len(x), len(y), _gaussians([width]), y.double().mean(0)
    x, y = x.double() - centre, y.double() - centre
    own = [torch.cat([kernel(part, of).sum(1) for part in of.split(_rows(len(of)))]) - 1 for of in (x, y)]
    rows, columns = list[Tensor](), torch.zeros_like(y[:, 0])
    for part in x.split(_rows(m)):
        between = kernel(part, y)
        rows.append(between.sum(1))
        columns += between.sum(0)
    of_x, of_y = own[0] / (n - 1) - torch.cat(rows) / m, own[1] / (m - 1) - columns / n
    return (of_x.mean() + of_y.mean()).item(), 2 * (of_x.var() / n + of_y.var() / m).sqrt().item()


def _gaussians(widths: Sequence[float]) -> Kernel:
    """The mean of Gaussian kernels of these widths."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        total = torch.zeros_like(square)
        for w in widths:
            total += (square * (-0.5 / w**2)).exp_()
        return total / len(widths)

    return kernel


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    """The polynomial kernel (a.b / d + 1)^3 (Binkowski et al. 2018)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _unbiased(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """Gretton et al. 2012, Eq. 3, for two sets of possibly different sizes."""
    n, m = len(x), len(y)
    between = sum(kernel(part, y).sum().item() for part in x.split(_rows(m)))
    return _within(x, kernel) / (n * (n - 1)) + _within(y, kernel) / (m * (m - 1)) - 2 * between / (n * m)


def _within(x: Tensor, kernel: Kernel) -> float:
    """The sum of k(x_i, x_j) over i != j, each block off the diagonal once."""
    total, rows = 0.0, _rows(len(x))
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        own = kernel(part, part)
        total += (own.sum() - own.trace() + 2 * kernel(part, x[first + rows :]).sum()).item()
    return total


def _rows(columns: int) -> int:
    """Rows of a block of this many columns."""
    return max(1, BLOCK // columns)


def pick(x: Tensor, size: int, generator: Generator) -> Tensor:
    """Rows of x at random, without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:size]]


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased sd."""
    v = torch.tensor(values, dtype=torch.float64)
    return v.mean().item(), v.std().item()


def two_sample_auc(real: Real, fake: Fake, generator: Generator) -> float:
    """The mean area over both ways round of one random split in halves, in [0, 1].

    The machine is scikit-learn's own: C = 1, a Gaussian kernel whose width comes from the spread of the rows. Its time
    grows as the square of the rows: half a second for 4,000 of 64 numbers. It takes 4 rows or more on each
    side: two to learn, two to order.
    """
    from sklearn.metrics import roc_auc_score  # slow to import
    from sklearn.svm import SVC

    halves = [pick(x, len(x), generator).double().flatten(1).cpu().chunk(2) for x in (real, fake)]
    areas: list[float] = []
    for learnt in (0, 1):
        x, y = _sides(*(half[learnt] for half in halves))
        machine = SVC().fit(x, y)
        x, y = _sides(*(half[1 - learnt] for half in halves))
        areas.append(float(roc_auc_score(y, machine.decision_function(x))))
    return sum(areas) / 2


def auc_sd(samples: int, real: int) -> float:
    """The deviation of `two_sample_auc` from 0.5 where both are of one law (Mann & Whitney 1947), of one way round.

    Both ways agree, for they see the same difference between the halves: so the mean of both has it too.
    """
    n, m = samples // 2, real // 2
    return ((n + m + 1) / (12 * n * m)) ** 0.5


def _sides(real: Tensor, fake: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as one set, and which of them are fake."""
    return torch.cat([real, fake]).numpy(), np.repeat([0, 1], [len(real), len(fake)])


@dataclass(frozen=True)
class Score:
    """The sums of s splits over k classes; splits without images do not count."""

    count: Float64[Tensor, " s"]
    entropy: Float64[Tensor, " s"]  # sum of H[p(y | x)], in nats
    mass: Float64[Tensor, "s k"]  # sum of p(y | x)

    @classmethod
    def of(cls, logits: Float[Tensor, "n k"], index: Int64[Tensor, " n"], *, size: int, splits: int) -> "Score":
        """The sums of images numbered `index` in [0, size * splits), in splits of `size` images in a row."""
        p = logits.double().softmax(1)
        share = torch.nn.functional.one_hot(index.to(p.device) // size, splits).T.double()
        return cls(share.sum(1), share @ torch.special.entr(p).sum(1), share @ p)

    def __add__(self, other: "Score") -> "Score":
        """The sums over both sets of images."""
        return Score(self.count + other.count, self.entropy + other.entropy, self.mass + other.mass)

    def value(self) -> tuple[float, float]:
        """Mean and sd over the splits, the sd that of these splits themselves. There are images."""
        full = self.count > 0
        count = self.count[full]
        marginal = torch.special.entr(self.mass[full] / count[:, None]).sum(1)
        scores = (marginal - self.entropy[full] / count).exp()
        return scores.mean().item(), scores.std(correction=0).item()
