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
- The same of classes: of laws P = sum_c p_c P_c and Q = sum_c p_c Q_c, each class's pairs are averaged on their own and
  weighed by p. So it is unbiased, too, where classes come in turn, and samples may have them in other shares than the
  data. With h(x) = E k(x, x') - E k(x, y) and g(y) = E k(y, y') - E k(x, y), each over the pairs of its row, MMD^2 is
  the mean of h and that of g, and its standard error the root of 4 sum_c p_c^2 (var_c h / n_c + var_c g / m_c), the
  first term of Hoeffding's decomposition of a U-statistic (1948). Where nothing differs this term vanishes, and what
  stands for it is about 1.4 times the deviation (ours).
- The class-conditional distance, sum_c p_c MMD^2(P_c, Q_c): 0 exactly when every class has its own law. The distance
  above compares P with Q as a whole, so it does not see which label a row has. Classes are independent: the variance is
  sum_c p_c^2 times that of class c. Of n and m rows of one law it is 2 E k~^2 (1 / n(n-1) + 1 / m(m-1) + 2 / nm), where
  k~ is the kernel less its means over each row and column, without bias by U-centring (Székely & Rizzo 2014).
- The classifier two-sample test: a classifier learns one half of each set, and orders the other half. The area under
  its curve (AUC) is the chance that it puts a random fake behind a random real row: 0.5 of equal laws, 1 where the two
  never mix (Lopez-Paz & Oquab 2017, who count right answers instead; the area needs no threshold).
- The Inception Score of a split of images, exp mean_x KL(p(y | x) || p(y)) = exp(H[p(y)] - mean_x H[p(y | x)])
  (Salimans et al. 2016), from 1 (all answers alike) to the number of classes. It needs three sums: how many images,
  their p(y | x), and their entropies. A split of fewer images scores less: its size is part of the measure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Generator, Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.types import Cond, UserError

Real = Float[Tensor, "n *d"]
Fake = Float[Tensor, "m *d"]
Points = Float[Tensor, "n d"]
Images = Float[Tensor, "n c h w"]
Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, d), (m, d) -> (n, m)

SIDE = 8  # pixels a side that images are reduced to at most, where pixels are compared: ours
NULL_ROWS = 2000  # rows from whose pairs a deviation of no difference is computed, to a hundredth: ours
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
        share = other.count / max(count, 1)
        delta = other.mean - self.mean
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
    return frechet_distance(Moments.of(reduce_pixels(x, side)), Moments.of(reduce_pixels(y, side)))


def reduce_pixels(x: Images, side: int = SIDE) -> Float64[Tensor, "n d"]:
    """The images as rows of c * side^2 means over areas of their pixels; smaller images keep their size."""
    size = (min(side, x.shape[2]), min(side, x.shape[3]))
    pooled = [adaptive_avg_pool2d(images.double(), size) for images in x.cpu().split(256)]
    return torch.cat(pooled).flatten(1)


def mmd2(x: Points, y: Float[Tensor, "m d"], widths: Sequence[float]) -> float:
    """Unbiased MMD^2 by the mean of the Gaussian kernels exp(-|a - b|^2 / 2 w^2) of these widths w > 0, in float64.

    It has no unit, and is at most 2. Each side needs 2 points or more.
    """
    centre = y.double().mean(0)  # kernels see differences only, and small numbers cancel less
    return _unbiased(x.double() - centre, y.double() - centre, _gaussians(widths))


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def level(estimates: Sequence[Estimate]) -> list[bool]:
    """Whether each estimate is level with the least: at most two standard errors of the difference above it."""
    least = min(estimates)
    is_level: list[bool] = []
    for estimate in estimates:
        error = (estimate.error**2 + least.error**2) ** 0.5
        is_level.append(estimate.value - least.value <= 2 * error)
    return is_level


def gaussian_mmd(
    x: Points, y: Float[Tensor, "m d"], width: float, c: Cond | None = None, d: Int64[Tensor, " m"] | None = None
) -> Estimate:
    """Unbiased MMD^2 times 1000 of a Gaussian kernel of this width, of rows x of classes c to y of classes d.

    Times 1000 as in Jayasumana et al. 2024 (CMMD). Classes have the weights of their shares in y; classes are ignored
    where one of y has fewer than two rows on a side. Each side needs 2 rows or more.
    """
    ones_x, ones_y, shares = _class_ones(c, len(x), d, len(y))
    centre = y.double().mean(0)
    rows_x = (x.double() - centre) / width
    rows_y = (y.double() - centre) / width
    within_x, _ = _class_sums(rows_x, rows_x, ones_x, ones_x)
    within_y, _ = _class_sums(rows_y, rows_y, ones_y, ones_y)
    between_x, between_y = _class_sums(rows_x, rows_y, ones_x, ones_y)
    value_x, variance_x = _mean_and_variance(within_x, between_x, ones_x, ones_y.sum(0), shares)
    value_y, variance_y = _mean_and_variance(within_y, between_y, ones_y, ones_x.sum(0), shares)
    return Estimate(1000 * (value_x + value_y), 1000 * (variance_x + variance_y) ** 0.5)


def _mean_and_variance(
    within: Float64[Tensor, "n k"],
    between: Float64[Tensor, "n k"],
    ones: Float64[Tensor, "n k"],
    other_counts: Float64[Tensor, " k"],
    shares: Float64[Tensor, " k"],
) -> tuple[float, float]:
    """The mean of h over the rows of one side, and that side's part of the variance (see the top of this file).

    `within` and `between` are the sums of the kernel over the rows of each class, of this side and the other; `ones`
    says which class a row has, `other_counts` how many rows of the other side have it.
    """
    counts = ones.sum(0)
    h = ((within - ones) / (counts - ones) - between / other_counts) @ shares  # no pair of a row with itself
    means = ones.T @ h / counts
    variances = ones.T @ (h - ones @ means).square() / (counts - 1) / counts
    return (shares @ means).item(), 4 * (shares.square() @ variances).item()


def mmd_deviation(n: int, y: Float[Tensor, "m d"], width: float, d: Int64[Tensor, " m"] | None = None) -> float:
    """The deviation of `gaussian_mmd` of n rows x that have the distribution of y, so that nothing differs.

    Its variance is 2 (1/n + 1/m)^2 E k(y, y')^2 of the kernel less its means over each row and column (Gretton et al.
    2012, Theorem 12), within each class, where there are classes (ours). The mean is over pairs of `NULL_ROWS` rows at
    most.
    """
    step = -(-len(y) // NULL_ROWS)
    some = (y[::step].double() - y.double().mean(0)) / width
    some_d = None if d is None else d[::step]
    ones, _, _ = _class_ones(some_d, len(some), some_d, len(some))
    less_class_means = (torch.eye(len(some)) - ones / ones.sum(0) @ ones.T).to(some)
    kernel = less_class_means @ (-torch.cdist(some, some).square() / 2).exp() @ less_class_means
    pairs = kernel.square().sum() - kernel.diagonal().square().sum()
    return 1000 * (1 / n + 1 / len(y)) * (2 * pairs.item() / (len(some) * (len(some) - 1))) ** 0.5


def class_mmd(
    x: Points, y: Float[Tensor, "m d"], width: float, c: Int64[Tensor, " n"], d: Int64[Tensor, " m"]
) -> Estimate:
    """The mean over classes of the unbiased MMD^2 times 1000 of rows x of class c to rows y of class d.

    Classes are weighted by their shares in y. Only `shared_classes` count; there must be one. The kernel is that of
    `gaussian_mmd`.
    """
    classes = shared_classes(c, d)
    value = 0.0
    variance = 0.0
    for k, share in zip(classes, class_shares(d, classes), strict=True):
        estimate = gaussian_mmd(x[c == k], y[d == k], width)
        value += share * estimate.value
        variance += share**2 * estimate.error**2
    return Estimate(value, variance**0.5)


def class_mmd_deviation(c: Int64[Tensor, " n"], y: Float[Tensor, "m d"], width: float, d: Int64[Tensor, " m"]) -> float:
    """The deviation of `class_mmd` of samples of classes c that have the distribution of y in each class.

    A class of fewer than four rows, too few for U-centring, is taken to scatter as all rows together do.
    """
    classes = shared_classes(c, d)
    rows = (y.double() - y.double().mean(0)) / width
    variance = 0.0
    for k, share in zip(classes, class_shares(d, classes), strict=True):
        n = int((c == k).sum())
        m = int((d == k).sum())
        square = _centred_square(rows[d == k] if m >= 4 else rows)
        pairs = 1 / (n * (n - 1)) + 1 / (m * (m - 1)) + 2 / (n * m)
        variance += share**2 * 2 * square * pairs
    return 1000 * variance**0.5


def shared_classes(c: Int64[Tensor, " n"], d: Int64[Tensor, " m"]) -> list[int]:
    """The classes that have two rows or more both in c and in d."""
    c_counts = c.cpu().bincount()
    d_counts = d.cpu().bincount(minlength=len(c_counts))
    is_shared = torch.minimum(c_counts, d_counts[: len(c_counts)]) >= 2
    return is_shared.nonzero()[:, 0].tolist()


def class_shares(d: Int64[Tensor, " m"], classes: Sequence[int]) -> list[float]:
    """The share of each of these classes among the rows of d that have one of them."""
    counts = [int((d == k).sum()) for k in classes]
    return [count / sum(counts) for count in counts]


def _centred_square(rows: Points) -> float:
    """E k~(y, y')^2 without bias, from `NULL_ROWS` rows at most, in units of the kernel's width. It needs 4 rows."""
    some = rows[:: -(-len(rows) // NULL_ROWS)]
    n = len(some)
    kernel = (-torch.cdist(some, some).square() / 2).exp().fill_diagonal_(0)
    means = kernel.sum(1) / (n - 2)
    centred = kernel - means[:, None] - means + kernel.sum() / ((n - 1) * (n - 2))
    centred.fill_diagonal_(0)
    return centred.square().sum().item() / (n * (n - 3))


def _class_ones(
    c: Tensor | None, n: int, d: Tensor | None, m: int
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "m k"], Float64[Tensor, " k"]]:
    """Which class each of n and m rows has, as a 1 in its column, and the shares of the classes among the m rows.

    Without classes, and where one of d has fewer than two rows on a side, so no pair, all are of one class.
    """
    if c is None or d is None:
        c = torch.zeros(n, dtype=torch.long)
        d = torch.zeros(m, dtype=torch.long)
    classes = d.cpu().unique()
    ones_x = (c.cpu()[:, None] == classes).double()
    ones_y = (d.cpu()[:, None] == classes).double()
    if (ones_x.sum(0) < 2).any() or (ones_y.sum(0) < 2).any():
        ones_x = torch.ones(n, 1, dtype=torch.float64)
        ones_y = torch.ones(m, 1, dtype=torch.float64)
    return ones_x, ones_y, ones_y.mean(0)


def _class_sums(
    x: Tensor, y: Tensor, ones_x: Tensor, ones_y: Tensor
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "m k"]]:
    """Sums of exp(-|x_i - y_j|^2 / 2) by class: (n, k) for every x over the rows y, (m, k) for every y over x."""
    block_rows = _block_rows(len(y))
    half_squares = y.square().sum(1) / 2
    sums_x: list[Tensor] = []
    sums_y = torch.zeros_like(ones_y)
    for part, ones in zip(x.split(block_rows), ones_x.split(block_rows), strict=True):
        exponents = torch.addmm(-half_squares, part, y.T).sub_(part.square().sum(1, keepdim=True) / 2)
        kernel = exponents.exp_().cpu()
        sums_x.append(kernel @ ones_y)
        sums_y += kernel.T @ ones
    return torch.cat(sums_x), sums_y


def null_spread(
    draw: Callable[[int], Points], widths: Sequence[float], count: int, *, pairs: int = 50, rows: int = 1000
) -> tuple[float, float]:
    """Mean and sd of `mmd2` between two independent sets of `count` points of one distribution: no difference.

    `draw(i)` gives the i-th independent set, of at least min(rows, count) points. Under the null n MMD^2 has a law
    that depends on n no more (Gretton et al. 2012, Theorem 12), so `pairs` pairs of sets of `rows` points, a hundredth
    of the work, scaled by rows / count, serve for `count`. The relative error of the sd is about 1 / sqrt(2 pairs).
    """
    size = min(rows, count)
    values: list[float] = []
    for i in range(pairs):
        distance = mmd2(draw(2 * i)[:size], draw(2 * i + 1)[:size], widths)
        values.append(distance * size / count)
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
    x = x.double()
    y = y.double()
    values: list[float] = []
    for _ in range(subsets):
        subset_x = pick(x, subset_size, generator)
        subset_y = pick(y, subset_size, generator)
        values.append(_unbiased(subset_x, subset_y, _cubic))
    return mean_sd(values)


def kernel_distance(x: Points, y: Float[Tensor, "m d"]) -> float:
    """The kernel distance of `kid` between all of x and y."""
    return _unbiased(x.double(), y.double(), _cubic)


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
    """Unbiased MMD^2 of rows x and y by a kernel (Gretton et al. 2012, Eq. 3); the sizes may differ."""
    n = len(x)
    m = len(y)
    between = sum(kernel(part, y).sum().item() for part in x.split(_block_rows(m)))
    return _within(x, kernel) / (n * (n - 1)) + _within(y, kernel) / (m * (m - 1)) - 2 * between / (n * m)


def _within(x: Tensor, kernel: Kernel) -> float:
    """The sum of k(x_i, x_j) over i != j, each block off the diagonal once."""
    rows = _block_rows(len(x))
    total = 0.0
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        diagonal_block = kernel(part, part)
        blocks_right = kernel(part, x[first + rows :])
        total += (diagonal_block.sum() - diagonal_block.trace() + 2 * blocks_right.sum()).item()
    return total


def _block_rows(columns: int) -> int:
    """How many rows a block of this many columns has."""
    return max(1, BLOCK // columns)


def pick(x: Tensor, size: int, generator: Generator) -> Tensor:
    """Rows of x at random, without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:size]]


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased sd."""
    v = torch.tensor(values, dtype=torch.float64)
    return v.mean().item(), v.std().item()


def two_sample_auc(real: Real, fake: Fake, generator: Generator) -> float:
    """The area under the curve of a classifier between real and fake rows, in [0, 1]; 0.5 where nothing differs.

    The rows are split in random halves; one half trains the classifier and the other is ordered, then the other way
    round, and the two areas are averaged. The classifier is scikit-learn's support vector machine as it comes: C = 1, a
    Gaussian kernel whose width comes from the spread of the rows. Its time grows as the square of the rows: half a
    second for 4,000 of 64 numbers. Each side needs 4 rows or more.
    """
    from sklearn.metrics import roc_auc_score  # slow to import
    from sklearn.svm import SVC

    real_halves = pick(real, len(real), generator).double().flatten(1).cpu().chunk(2)
    fake_halves = pick(fake, len(fake), generator).double().flatten(1).cpu().chunk(2)
    areas: list[float] = []
    for learnt in (0, 1):
        x, y = _with_labels(real_halves[learnt], fake_halves[learnt])
        machine = SVC().fit(x, y)
        x, y = _with_labels(real_halves[1 - learnt], fake_halves[1 - learnt])
        areas.append(float(roc_auc_score(y, machine.decision_function(x))))
    return sum(areas) / 2


def auc_sd(samples: int, real: int) -> float:
    """The deviation of `two_sample_auc` from 0.5 where both sides have one distribution (Mann & Whitney 1947).

    It is that of one area; the mean of the two areas has it too, for both see the same difference between the halves.
    """
    n = samples // 2
    m = real // 2
    return ((n + m + 1) / (12 * n * m)) ** 0.5


def _with_labels(real: Tensor, fake: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n + m, d) of both sets, real ones first, and their labels (n + m,): 0 real, 1 fake."""
    rows = torch.cat([real, fake]).numpy()
    is_fake = np.repeat([0, 1], [len(real), len(fake)])
    return rows, is_fake


@dataclass(frozen=True)
class InceptionScore:
    """The sums that the score is made of, of s splits over k classes; splits without images do not count."""

    count: Float64[Tensor, " s"]
    entropy: Float64[Tensor, " s"]  # sum of H[p(y | x)], in nats
    mass: Float64[Tensor, "s k"]  # sum of p(y | x)

    @classmethod
    def of(
        cls, logits: Float[Tensor, "n k"], index: Int64[Tensor, " n"], *, size: int, splits: int
    ) -> "InceptionScore":
        """The sums of images numbered `index` in [0, size * splits), in splits of `size` images in a row."""
        p = logits.double().softmax(1)
        share = torch.nn.functional.one_hot(index.to(p.device) // size, splits).T.double()
        return cls(share.sum(1), share @ torch.special.entr(p).sum(1), share @ p)

    def __add__(self, other: "InceptionScore") -> "InceptionScore":
        """The sums over both sets of images."""
        return InceptionScore(self.count + other.count, self.entropy + other.entropy, self.mass + other.mass)

    def value(self) -> tuple[float, float]:
        """The mean of the score over the splits, and their sd as a whole population. One split has images at least."""
        has_images = self.count > 0
        count = self.count[has_images]
        marginal_entropy = torch.special.entr(self.mass[has_images] / count[:, None]).sum(1)
        scores = (marginal_entropy - self.entropy[has_images] / count).exp()
        return scores.mean().item(), scores.std(correction=0).item()
