"""Kernel distances (MMD^2) between samples and data, over all rows and by class, and their null distributions.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

With a Gaussian kernel it is 0 if and only if x and y have the same distribution. Pairs of a row with itself are left
out, so the estimate is unbiased (Gretton et al. 2012, Eq. 3) and may be negative.

| function | kernel | classes | uncertainty |
|---|---|---|---|
| `mmd2` | Gaussians of several widths | none | `null_spread`, by draws |
| `kid` | cubic | none | spread over subsets |
| `gaussian_mmd` | Gaussian | weighted by their shares of the data | standard error; `gaussian_mmd_null_sd` |
| `class_mmd` | Gaussian | the mean of the classes' MMD^2 | standard error; `class_mmd_null_sd` |

`mmd_scores` returns the last two as scores of a protocol, times 1000 as in Jayasumana et al. 2024 (CMMD).
`perfect_sampler_scores` returns the scores of a sampler that draws new real images. Kernel distances are unbiased, so
their expectation is 0 and only their spread is computed. For any other squared distance, such as the Fréchet distance,
`measure_null_distance` compares parts of the data with each other.

In functions with classes, `fake` are samples x, n_c of them in class c, and `real` are data y, m_c in class c;
`sample_c` and `real_c` are the classes, and `width` is the width of the kernel. Only classes with two rows or more on
both sides are used (`shared_classes`), and p_c is the share of class c among their data.

**As a whole.** P = sum_c p_c P_c is compared with Q = sum_c p_c Q_c. Pairs are averaged within each class, or pair of
classes, and weighted by p. So the estimate is unbiased, even for stratified samples (classes in turn instead of random)
and for samples with other shares of classes than the data. Let h(x) = E k(x, x') - E k(x, y) and
g(y) = E k(y, y') - E k(x, y), with E over all other rows x' or y' of one side, and all rows of the other side. Then

    MMD^2     = mean h + mean g
    variance  = 4 sum_c p_c^2 (var_c h / n_c + var_c g / m_c)

The variance is the first term of Hoeffding's decomposition of a U-statistic (1948). It vanishes for equal
distributions; its estimate then gives about 1.4 times the true sd (our measurement).

**Class by class.** sum_c p_c MMD^2(P_c, Q_c) is 0 if and only if samples and data have the same distribution in every
class, whereas the distance as a whole does not depend on the label of a row. Classes are independent, so the variance
is the sum of p_c^2 times the variance of class c. For equal distributions, the latter is

    2 E k~^2 (1 / n_c(n_c - 1) + 1 / m_c(m_c - 1) + 2 / n_c m_c)

k~ is the kernel minus its means over rows and columns, made unbiased by U-centring (Székely & Rizzo 2014).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Generator, Tensor

from dumo.evaluation.estimate import Estimate, mean_sd
from dumo.evaluation.frechet import Moments, frechet_distance
from dumo.evaluation.metric import CLASS_MMD
from dumo.evaluation.protocol import Scores
from dumo.io import digest
from dumo.io.read import first_few
from dumo.runtime.random import stream
from dumo.types import Cond, UserError

Points = Float[Tensor, "n d"]
OtherPoints = Float[Tensor, "m d"]
SampleFeatures = Float[Tensor, "n f"]
RealFeatures = Float[Tensor, "m f"]
SampleClasses = Int64[Tensor, " n"]
RealClasses = Int64[Tensor, " m"]
# (n, d), (m, d) -> (n, m)
Kernel = Callable[[Tensor, Tensor], Tensor]
# The scale of a distance between n and m rows of the same distribution.
Scale = Callable[[int, int], float]

# Numbers per block of a kernel matrix: 4 MB, about the size of a processor's cache.
BLOCK = 2**19
# The factor of the values and errors of `gaussian_mmd` and `class_mmd`, as in CMMD.
MMD_FACTOR = 1000
# A null sd is computed from the pairs of at most this many rows, with an error of 1 % (our choice).
MAX_NULL_ROWS = 2000
# U-centring divides by n - 3.
MIN_CENTRED_ROWS = 4
# The largest number of classes listed in a report.
MAX_NAMED = 10
# The largest number of rows per part, unless `min_part_rows` is larger (our choice).
MAX_PART_ROWS = 5000
# The number of compared pairs of parts. The relative error of their spread is then 10 % (our choice).
PART_PAIRS = 60
# For Fréchet distances. Chong & Forsyth start at 5,000 rows for 2,048 features.
MIN_ROWS_PER_FEATURE = 2.5


# -------------------------------------------------------------------------------------------------- without classes


def mmd2(x: Points, y: OtherPoints, widths: Sequence[float]) -> float:
    """Compute MMD^2 with the mean of the Gaussian kernels exp(-|a - b|^2 / 2 w^2) for widths w > 0, in float64.

    It is at most 2. Each side needs 2 rows or more.
    """
    # Kernels only depend on differences, and centring reduces cancellation.
    centre = y.double().mean(0)
    return _unbiased(x.double() - centre, y.double() - centre, _mean_gaussian_kernel(widths))


def null_spread(
    draw: Callable[[int], Points], widths: Sequence[float], count: int, *, pairs: int = 50, rows: int = 1000
) -> tuple[float, float]:
    """Estimate the mean and sd of `mmd2` between two independent sets of `count` rows of the same distribution.

    `draw(i)` returns the i-th independent set, of at least min(rows, count) rows. For equal distributions, the
    distribution of n MMD^2 does not depend on n (Gretton et al. 2012, Theorem 12). So `pairs` pairs of sets of `rows`
    rows are compared, with a hundredth of the work, and the distances scaled by rows / count. The relative error of the
    sd is about 1 / sqrt(2 pairs).
    """
    set_rows = min(rows, count)
    values: list[float] = []
    for i in range(pairs):
        distance = mmd2(draw(2 * i)[:set_rows], draw(2 * i + 1)[:set_rows], widths)
        values.append(distance * set_rows / count)
    return mean_sd(values)


def kid(x: Points, y: OtherPoints, *, subsets: int, subset_size: int, generator: Generator) -> tuple[float, float]:
    """Compute the mean and sd of MMD^2 with the cubic kernel over random subsets of rows.

    Subsets overlap, so the sd is the spread between subsets, not the error of the mean. With features of Inception, it
    is the KID of Binkowski et al. 2018. Raises UserError if a side has fewer than `subset_size` rows.
    """
    if subset_size > min(len(x), len(y)):
        raise UserError(
            f"subsets of {subset_size} rows need at least as many rows, got {len(x)} and {len(y)}: give more samples"
        )
    x = x.double()
    y = y.double()
    values: list[float] = []
    for _ in range(subsets):
        subset_x = pick_rows(x, subset_size, generator)
        subset_y = pick_rows(y, subset_size, generator)
        values.append(_unbiased(subset_x, subset_y, _cubic_kernel))
    return mean_sd(values)


def pick_rows(x: Tensor, count: int, generator: Generator) -> Tensor:
    """Choose `count` rows of x at random, without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:count]]


def block_rows(columns: int) -> int:
    """Return the number of rows of a kernel matrix with `columns` columns that fit into a block."""
    return max(1, BLOCK // columns)


def _mean_gaussian_kernel(widths: Sequence[float]) -> Kernel:
    """Return the mean of Gaussian kernels with these widths."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square_distances = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        total = torch.zeros_like(square_distances)
        for width in widths:
            total += (square_distances * (-0.5 / width**2)).exp_()
        return total / len(widths)

    return kernel


def _cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """The polynomial kernel (a.b / d + 1)^3 (Binkowski et al. 2018)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _unbiased(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """Compute unbiased MMD^2 of rows x and y with a kernel; the numbers of rows may differ."""
    n = len(x)
    m = len(y)
    between = sum(kernel(block, y).sum().item() for block in x.split(block_rows(m)))
    mean_within_x = _sum_within(x, kernel) / (n * (n - 1))
    mean_within_y = _sum_within(y, kernel) / (m * (m - 1))
    return mean_within_x + mean_within_y - 2 * between / (n * m)


def _sum_within(x: Tensor, kernel: Kernel) -> float:
    """Sum k(x_i, x_j) over i != j. The kernel is symmetric, so blocks off the diagonal are computed once."""
    rows = block_rows(len(x))
    total = 0.0
    for first in range(0, len(x), rows):
        block = x[first : first + rows]
        diagonal_block = kernel(block, block)
        blocks_right = kernel(block, x[first + rows :])
        total += (diagonal_block.sum() - diagonal_block.trace() + 2 * blocks_right.sum()).item()
    return total


# ----------------------------------------------------------------------------------------------------------- as a whole


def gaussian_mmd(
    fake: SampleFeatures,
    real: RealFeatures,
    width: float,
    sample_c: Cond | None = None,
    real_c: RealClasses | None = None,
) -> Estimate:
    """Compute MMD^2 times 1000 of the rows in `shared_classes`, weighted by the classes' shares of the data.

    All rows count as one class if there are no classes, if none is shared, or if a class of the data has no sample.
    Each side needs 2 rows or more.
    """
    if sample_c is None or real_c is None:
        sample_c = torch.zeros(len(fake), dtype=torch.long)
        real_c = torch.zeros(len(real), dtype=torch.long)
    fake_one_hot, real_one_hot, shares = _one_hot_classes(sample_c, real_c)
    centre = real.double().mean(0)
    x = (fake.double() - centre) / width
    y = (real.double() - centre) / width
    within_fake, _ = _kernel_sums(x, x, fake_one_hot, fake_one_hot)
    within_real, _ = _kernel_sums(y, y, real_one_hot, real_one_hot)
    fake_to_real, real_to_fake = _kernel_sums(x, y, fake_one_hot, real_one_hot)
    fake_mean, fake_variance = _mean_and_variance(within_fake, fake_to_real, fake_one_hot, real_one_hot.sum(0), shares)
    real_mean, real_variance = _mean_and_variance(within_real, real_to_fake, real_one_hot, fake_one_hot.sum(0), shares)
    return Estimate(MMD_FACTOR * (fake_mean + real_mean), MMD_FACTOR * (fake_variance + real_variance) ** 0.5)


def gaussian_mmd_null_sd(sample_c: SampleClasses, real: RealFeatures, width: float, real_c: RealClasses) -> float:
    """Compute the sd of `gaussian_mmd` for samples with the data's distribution in each class.

    With one class its variance is 2 (1/n + 1/m)^2 E k(y, y')^2, where k is the kernel minus its means over rows and
    columns (Gretton et al. 2012, Theorem 12). With several classes (our extension) the means are over the rows of a
    class, and a row of class c has the weight p_c (1/n_c + 1/m_c), which is 1/n + 1/m if samples have the data's shares
    of classes. The outer mean is over the pairs of some rows of the data (`_choose_null_rows`).
    """
    fake_one_hot, real_one_hot, shares = _one_hot_classes(sample_c, real_c)
    class_weights = shares * (1 / fake_one_hot.sum(0) + 1 / real_one_hot.sum(0))
    rows = _choose_null_rows(real_one_hot)
    y = (real[rows].double() - real.double().mean(0)) / width
    one_hot = real_one_hot[rows]
    # Some classes may have none of the chosen rows.
    counts = one_hot.sum(0).clamp(min=1)
    # A row is part of the mean of its class, which reduces the variance of the residual by the factor 1 - 1 / n.
    row_weights = (one_hot @ (class_weights * counts / (counts - 1).clamp(min=1))).to(y)
    # Subtract the class means of the kernel over rows and columns.
    subtract_class_means = (torch.eye(len(y)) - one_hot / counts @ one_hot.T).to(y)
    kernel = subtract_class_means @ (-torch.cdist(y, y).square() / 2).exp() @ subtract_class_means
    squares = kernel.square() * row_weights * row_weights[:, None]
    mean_square = (squares.sum() - squares.trace()).item() / (len(y) * (len(y) - 1))
    return MMD_FACTOR * (2 * mean_square) ** 0.5


def _choose_null_rows(real_one_hot: Float64[Tensor, "m k"]) -> Int64[Tensor, " n"]:
    """Choose about `MAX_NULL_ROWS` evenly spaced rows at most, in proportion to the classes.

    Classes that would keep fewer than two rows are used with all rows or with none. A row alone in its class is
    excluded.
    """
    counted_rows = real_one_hot.any(1).nonzero()[:, 0]
    stride = -(-len(counted_rows) // MAX_NULL_ROWS)

    # The stride would leave fewer than two rows of small classes. Use all rows of every stride-th small class instead.
    is_small = real_one_hot.sum(0) < 2 * stride
    whole_classes = is_small.nonzero()[:, 0][::stride]
    counted_one_hot = real_one_hot[counted_rows]
    of_small_class = counted_one_hot[:, is_small].any(1)
    of_whole_class = counted_one_hot[:, whole_classes].any(1)
    strided_rows = counted_rows[~of_small_class][::stride]
    rows = torch.cat([strided_rows, counted_rows[of_whole_class]])

    one_hot = real_one_hot[rows]
    num_in_own_class = one_hot @ one_hot.sum(0)
    return rows[num_in_own_class >= 2]


def _mean_and_variance(
    within: Float64[Tensor, "n k"],
    between: Float64[Tensor, "n k"],
    one_hot: Float64[Tensor, "n k"],
    other_counts: Float64[Tensor, " k"],
    shares: Float64[Tensor, " k"],
) -> tuple[float, float]:
    """Return the mean of h (or g) over the n rows of one side, and its contribution to the variance.

    within, between: sums of the kernel from each row to the rows of each class, on its own and on the other side.
    one_hot: the class of each row.
    other_counts: the number of rows of each class on the other side.
    """
    counts = one_hot.sum(0)
    # Exclude the row itself, whose kernel is 1.
    mean_within = (within - one_hot) / (counts - one_hot)
    mean_between = between / other_counts
    h = (mean_within - mean_between) @ shares
    class_means = one_hot.T @ h / counts
    class_variances = one_hot.T @ (h - one_hot @ class_means).square() / (counts - 1) / counts
    return (shares @ class_means).item(), 4 * (shares.square() @ class_variances).item()


def _one_hot_classes(
    sample_c: SampleClasses, real_c: RealClasses
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "m k"], Float64[Tensor, " k"]]:
    """Return one-hot `shared_classes` of samples (n, k) and data (m, k), and the classes' shares of the data (k,).

    Rows in other classes are 0 and have no weight. All rows count as one class if no class is shared. They also do if a
    class of the data has no sample, since its missing images must increase the distance.
    """
    classes = torch.tensor(shared_classes(sample_c, real_c))
    if len(classes) == 0 or missing_classes(sample_c, real_c):
        fake_one_hot = torch.ones(len(sample_c), 1, dtype=torch.float64)
        real_one_hot = torch.ones(len(real_c), 1, dtype=torch.float64)
    else:
        fake_one_hot = (sample_c.cpu()[:, None] == classes).double()
        real_one_hot = (real_c.cpu()[:, None] == classes).double()
    counts = real_one_hot.sum(0)
    return fake_one_hot, real_one_hot, counts / counts.sum()


def _kernel_sums(
    x: Tensor, y: Tensor, x_one_hot: Tensor, y_one_hot: Tensor
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "m k"]]:
    """Sum exp(-|x_i - y_j|^2 / 2) by class: (n, k) from every x to the rows y, and (m, k) from every y to x."""
    rows = block_rows(len(y))
    half_squares = y.square().sum(1) / 2
    x_sums: list[Tensor] = []
    y_sums = torch.zeros_like(y_one_hot)
    for block, block_one_hot in zip(x.split(rows), x_one_hot.split(rows), strict=True):
        exponents = torch.addmm(-half_squares, block, y.T).sub_(block.square().sum(1, keepdim=True) / 2)
        # The one-hot classes and all sums are on the CPU.
        kernel = exponents.exp_().cpu()
        x_sums.append(kernel @ y_one_hot)
        y_sums += kernel.T @ block_one_hot
    return torch.cat(x_sums), y_sums


# ------------------------------------------------------------------------------------------------------- class by class


def class_mmd(
    fake: SampleFeatures, real: RealFeatures, width: float, sample_c: SampleClasses, real_c: RealClasses
) -> Estimate:
    """Compute the mean over `shared_classes`, of which there must be one, of MMD^2 times 1000 within a class."""
    classes = shared_classes(sample_c, real_c)
    value = 0.0
    variance = 0.0
    for label, share in zip(classes, class_shares(real_c, classes), strict=True):
        estimate = gaussian_mmd(fake[sample_c == label], real[real_c == label], width)
        value += share * estimate.value
        variance += share**2 * estimate.error**2
    return Estimate(value, variance**0.5)


def class_mmd_null_sd(sample_c: SampleClasses, real: RealFeatures, width: float, real_c: RealClasses) -> float:
    """Compute the sd of `class_mmd` for samples with the data's distribution in each class.

    A class with too few rows for U-centring uses the kernel of all rows.
    """
    classes = shared_classes(sample_c, real_c)
    y = (real.double() - real.double().mean(0)) / width
    variance = 0.0
    for label, share in zip(classes, class_shares(real_c, classes), strict=True):
        n = int((sample_c == label).sum())
        m = int((real_c == label).sum())
        mean_square = _centred_mean_square(y[real_c == label] if m >= MIN_CENTRED_ROWS else y)
        pairs = 1 / (n * (n - 1)) + 1 / (m * (m - 1)) + 2 / (n * m)
        variance += share**2 * 2 * mean_square * pairs
    return MMD_FACTOR * variance**0.5


def shared_classes(sample_c: SampleClasses, real_c: RealClasses) -> list[int]:
    """Return the classes with two rows or more on both sides."""
    sample_counts = sample_c.cpu().bincount()
    real_counts = real_c.cpu().bincount(minlength=len(sample_counts))
    is_shared = torch.minimum(sample_counts, real_counts[: len(sample_counts)]) >= 2
    return is_shared.nonzero()[:, 0].tolist()


def missing_classes(sample_c: SampleClasses, real_c: RealClasses) -> list[int]:
    """Return the classes of the data without samples."""
    return sorted({*real_c.tolist()} - {*sample_c.tolist()})


def class_shares(real_c: RealClasses, classes: Sequence[int]) -> list[float]:
    """Return the share of each of `classes` among the data in these classes."""
    counts = [int((real_c == label).sum()) for label in classes]
    return [count / sum(counts) for count in counts]


def _centred_mean_square(y: Float64[Tensor, "n f"]) -> float:
    """Compute the unbiased estimate of E k~(y, y')^2 over at most `MAX_NULL_ROWS` evenly spaced rows of y.

    y must be in units of the kernel's width, with `MIN_CENTRED_ROWS` rows or more.
    """
    stride = -(-len(y) // MAX_NULL_ROWS)
    y = y[::stride]
    n = len(y)
    kernel = (-torch.cdist(y, y).square() / 2).exp().fill_diagonal_(0)
    # U-centring leaves the diagonal out of all means.
    means = kernel.sum(1) / (n - 2)
    centred = kernel - means[:, None] - means + kernel.sum() / ((n - 1) * (n - 2))
    centred.fill_diagonal_(0)
    return centred.square().sum().item() / (n * (n - 3))


# ----------------------------------------------------------------------------------------------- scores of a protocol


def mmd_scores(
    fake: SampleFeatures, real: RealFeatures, *, width: float, sample_c: SampleClasses, real_c: RealClasses
) -> Scores:
    """Return `mmd` and, if there are shared classes, `class_mmd`, with standard errors `mmd_sd` and `class_mmd_sd`."""
    if not _has_shared_classes(sample_c, real_c):
        without_classes = gaussian_mmd(fake, real, width)
        return {"mmd": without_classes.value, "mmd_sd": without_classes.error}
    over_all_rows = gaussian_mmd(fake, real, width, sample_c, real_c)
    within_classes = class_mmd(fake, real, width, sample_c, real_c)
    return {
        "mmd": over_all_rows.value,
        "mmd_sd": over_all_rows.error,
        CLASS_MMD: within_classes.value,
        f"{CLASS_MMD}_sd": within_classes.error,
    }


def noise_class_mmd(
    noise: Float[Tensor, "b f"], real: RealFeatures, *, width: float, sample_c: SampleClasses, real_c: RealClasses
) -> Scores:
    """Return `class_mmd` with the noise as samples of every class; {} if there are no shared classes."""
    if not _has_shared_classes(sample_c, real_c):
        return {}
    classes = shared_classes(sample_c, real_c)
    distances = [gaussian_mmd(noise, real[real_c == k], width).value for k in classes]
    shares = class_shares(real_c, classes)
    return {CLASS_MMD: sum(share * distance for share, distance in zip(shares, distances, strict=True))}


def perfect_mmd_scores(real: RealFeatures, *, width: float, sample_c: SampleClasses, real_c: RealClasses) -> Scores:
    """Return the expected scores of `mmd_scores` for a perfect sampler, and their sd.

    `mmd` and its sd are called `mean` and `sd`, as in every baseline of evaluation.json.
    """
    if not _has_shared_classes(sample_c, real_c):
        sd = gaussian_mmd_null_sd(torch.zeros_like(sample_c), real, width, torch.zeros_like(real_c))
        return {"mean": 0.0, "sd": sd}
    return {
        "mean": 0.0,
        "sd": gaussian_mmd_null_sd(sample_c, real, width, real_c),
        CLASS_MMD: 0.0,
        f"{CLASS_MMD}_sd": class_mmd_null_sd(sample_c, real, width, real_c),
    }


def class_facts(sample_c: SampleClasses, real_c: RealClasses) -> dict[str, str]:
    """Return the card entry with the classes that `class_mmd` excludes; {} if it excludes none."""
    if not _has_classes(sample_c):
        return {}
    classes = {*sample_c.tolist(), *real_c.tolist()}
    shared = shared_classes(sample_c, real_c)
    left_out = sorted(classes - {*shared})
    if not left_out:
        return {}
    names = first_few(left_out, max_items=MAX_NAMED)
    if len(left_out) > MAX_NAMED:
        # The hash distinguishes cards with different excluded classes.
        names += f" (hash {digest.short(*map(str, left_out))})"
    return {
        CLASS_MMD: f"over {len(shared)} of {len(classes)} classes, without {names}, which have fewer than 2 images on "
        "a side"
    }


def _has_shared_classes(sample_c: SampleClasses, real_c: RealClasses) -> bool:
    return _has_classes(sample_c) and bool(shared_classes(sample_c, real_c))


def _has_classes(c: SampleClasses) -> bool:
    """Whether there is more than one class. Data without classes have class 0 only."""
    return bool((c != c[0]).any())


# ------------------------------------------------------------------------------------------ scores of a perfect sampler


def full_scale(n: int, m: int) -> float:
    """Return the scale of a squared distance between all of n and m rows."""
    return 1 / n + 1 / m


def subset_scale(num_subsets: int, subset_rows: int) -> Scale:
    """Return the scale of the mean kernel distance over random subsets with `subset_rows` rows of each side.

    Given all rows, the subsets are independent, and their expected distance is the distance of all rows. So by the law
    of total variance, the variance of their mean is

        var(all rows) + (var(one subset) - var(all rows)) / num_subsets
    """

    def scale(n: int, m: int) -> float:
        of_all = full_scale(n, m)
        of_subset = full_scale(subset_rows, subset_rows)
        return (of_all**2 + (of_subset**2 - of_all**2) / num_subsets) ** 0.5

    return scale


class NullDistance(NamedTuple):
    """Mean and sd of the squared distance of two independent samples of one distribution, relative to its scale.

    They do not depend on the numbers of rows (`measure_null_distance`).
    """

    mean: float
    sd: float

    def scaled_to(self, num_samples: int, num_real: int, scale: Scale = full_scale) -> tuple[float, float]:
        """Return the mean and sd of a distance with this scale between `num_samples` and `num_real` rows."""
        size = scale(num_samples, num_real)
        return self.mean * size, self.sd * size


def measure_null_distance(
    real_c: Cond,
    distance: Callable[[Tensor, Tensor], float],
    *,
    kind: str,
    min_part_rows: float,
    pairs: int = PART_PAIRS,
    scale: Scale = full_scale,
) -> NullDistance | None:
    """Estimate a null distance by comparing pairs of disjoint random parts of the data, in two sizes.

    real_c: (m,), the classes of the data.
    distance: takes the row numbers of two parts. Its scale is `scale`.
    kind: keys random draws.
    min_part_rows: None is returned if the small parts, half as large as the large ones, would have fewer rows.
    pairs: the smallest number of compared pairs.

    The ratio of distance and scale does not depend on the numbers of rows (our assumption, confirmed on digits from 128
    rows to 898): the error of moments of n rows is proportional to 1 / sqrt(n), and distances are squares of such
    errors, so

        FD(n) = FD_inf + bias / n    (Chong & Forsyth 2020, arXiv 1911.07023, Sec. 4)

    Between n and m rows of one distribution FD_inf is 0, and 1/n becomes 1/n + 1/m.

    Samples are generated with classes in turn, so the parts are stratified by class. On digits, unstratified parts
    would differ more by their counts of classes than by anything else.
    """
    large_part_rows = max(MAX_PART_ROWS, 2 * min_part_rows)
    num_large_parts = max(2, int(len(real_c) // large_part_rows))
    num_small_parts = 2 * num_large_parts
    if len(real_c) // num_small_parts < min_part_rows:
        return None
    pairs_per_round = num_large_parts // 2 + num_small_parts // 2
    num_rounds = -(-pairs // pairs_per_round)
    ratios: list[float] = []
    for i in range(num_rounds):
        for num_parts in (num_large_parts, num_small_parts):
            parts = random_parts(real_c, num_parts, stream(kind, "parts", num_parts, i))
            # An odd last part is not compared.
            for a, b in zip(parts[::2], parts[1::2], strict=False):
                ratios.append(distance(a, b) / scale(len(a), len(b)))
    mean, sd = mean_sd(ratios)
    return NullDistance(mean, sd)


def perfect_sampler_scores(
    kind: str,
    real: Float[Tensor, "m f"],
    *,
    width: float,
    sample_c: Int64[Tensor, " n"],
    real_c: Cond,
    kernel_rows: Int64[Tensor, " k"] | None = None,
    with_frechet: bool = True,
) -> Scores:
    """Return the expected scores and sd of a perfect sampler for samples with the classes `sample_c`.

    They are `mmd`, as `mean` and `sd`; `class_mmd`, if there are shared classes; and `fd`, if `with_frechet` is true
    and there are enough rows to estimate it. Kernel distances use the rows `kernel_rows` of `real`; None means all.
    """
    kernel_real = real
    kernel_real_c = real_c
    if kernel_rows is not None:
        kernel_real = real[kernel_rows]
        kernel_real_c = real_c[kernel_rows]
    scores = perfect_mmd_scores(kernel_real, width=width, sample_c=sample_c, real_c=kernel_real_c)
    if not with_frechet:
        return scores

    def distance(a: Tensor, b: Tensor) -> float:
        return frechet_distance(Moments.of(real[a]), Moments.of(real[b]))

    min_part_rows = MIN_ROWS_PER_FEATURE * real.shape[1]
    null_frechet = measure_null_distance(real_c, distance, kind=kind, min_part_rows=min_part_rows)
    if null_frechet:
        scores["fd"], scores["fd_sd"] = null_frechet.scaled_to(len(sample_c), len(real))
    return scores


def random_parts(c: Cond, num_parts: int, generator: Generator) -> list[Tensor]:
    """Split the rows of classes c (n,) at random into disjoint parts; return the row numbers of each part.

    Numbers of rows, in total and in each class, differ by at most one between parts.
    """
    order = torch.randperm(len(c), generator=generator)
    order = order[c[order].argsort(stable=True)]
    return [order[i::num_parts] for i in range(num_parts)]
