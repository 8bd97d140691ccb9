"""Kernel distances (MMD^2) between samples and data, of all rows and by class, and what a perfect sampler would have.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

It is 0 exactly when x and y have one distribution, for a Gaussian kernel. The pairs of a row with itself are left out,
so that the estimate is unbiased (Gretton et al. 2012, Eq. 3); it may therefore be negative.

| function | kernel | classes | uncertainty |
|---|---|---|---|
| `mmd2` | Gaussians of several widths | none | `null_spread`, by draws |
| `kid` | cubic | none | spread over subsets |
| `gaussian_mmd` | Gaussian | weighed by their shares of the data | standard error; `gaussian_mmd_null_sd` |
| `class_mmd` | Gaussian | the mean of the classes' MMD^2 | standard error; `class_mmd_null_sd` |

`mmd_scores` gives the last two as scores of a protocol, times 1000 as in Jayasumana et al. 2024 (CMMD).
`perfect_sampler_scores` gives the scores of a sampler that draws new real images: kernel distances have no bias, so
they are 0 in the mean, and only their spread is computed. `measure_null_distance` does so for any other squared
distance, such as the Fréchet distance, by comparing parts of the data with each other.

In the functions that see classes, `fake` are samples x, n_c of them in class c, and `real` are data y, m_c in class c;
`sample_c` and `real_c` are the classes, and `width` is that of the kernel. Only classes with two rows or more on both
sides count (`shared_classes`), and p_c is the share of class c in the data of these.

**As a whole.** P = sum_c p_c P_c is compared with Q = sum_c p_c Q_c. Pairs are averaged within each class, or pair of
classes, and weighed by p. So the estimate has no bias, also for stratified samples (their classes cycled, not drawn),
and samples may have the classes in other shares than the data. Let h(x) = E k(x, x') - E k(x, y) and
g(y) = E k(y, y') - E k(x, y), where E is over all other rows x' or y' of the side, and all rows of the other side. Then

    MMD^2     = mean h + mean g
    variance  = 4 sum_c p_c^2 (var_c h / n_c + var_c g / m_c)

The variance is the first term of Hoeffding's decomposition of a U-statistic (1948). It vanishes where nothing differs;
its estimate then gives about 1.4 times the true sd (ours).

**Class by class.** sum_c p_c MMD^2(P_c, Q_c) is 0 exactly when every class has its own distribution. The distance as a
whole does not depend on which label a row has. Classes are independent, so the variance is the sum of p_c^2 times that
of class c. Where nothing differs, the variance of class c is

    2 E k~^2 (1 / n_c(n_c - 1) + 1 / m_c(m_c - 1) + 2 / n_c m_c)

k~ is the kernel less its means over each row and column, without bias by U-centring (Székely & Rizzo 2014).
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
Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, d), (m, d) -> (n, m)
Scale = Callable[[int, int], float]  # of a distance between n and m rows of one distribution

BLOCK = 2**19  # numbers in a block of a kernel matrix: 4 MB, about a processor's cache
SCALE = 1000  # of the values and errors of `gaussian_mmd` and `class_mmd`: CMMD
MAX_NULL_ROWS = 2000  # rows from whose pairs a null sd is computed, to a hundredth: ours
MIN_CENTRED_ROWS = 4  # rows that U-centring needs: it divides by n - 3
MAX_NAMED = 10  # classes that a report names
MAX_PART_ROWS = 5000  # rows of a part, unless `min_part_rows` asks for more: ours
PART_PAIRS = 60  # pairs of parts that are compared; their spread is then known to a tenth: ours
MIN_ROWS_PER_FEATURE = 2.5  # of a Fréchet distance: Chong & Forsyth begin at 5,000 rows for 2,048 features


# -------------------------------------------------------------------------------------------------- without classes


def mmd2(x: Points, y: OtherPoints, widths: Sequence[float]) -> float:
    """MMD^2 by the mean of the Gaussian kernels exp(-|a - b|^2 / 2 w^2) of these widths w > 0, in float64.

    It has no unit, and is at most 2. Each side needs 2 rows or more.
    """
    centre = y.double().mean(0)  # kernels depend on differences only, and small numbers cancel less
    return _unbiased(x.double() - centre, y.double() - centre, _mean_gaussian_kernel(widths))


def null_spread(
    draw: Callable[[int], Points], widths: Sequence[float], count: int, *, pairs: int = 50, rows: int = 1000
) -> tuple[float, float]:
    """The mean and sd of `mmd2` between two independent sets of `count` rows of one distribution.

    `draw(i)` gives the i-th independent set, of at least min(rows, count) rows. Where nothing differs, the distribution
    of n MMD^2 does not depend on n (Gretton et al. 2012, Theorem 12). So `pairs` pairs of sets of `rows` rows are
    compared, a hundredth of the work, and the distances scaled by rows / count. The relative error of the sd is about
    1 / sqrt(2 pairs).
    """
    set_rows = min(rows, count)
    values: list[float] = []
    for i in range(pairs):
        distance = mmd2(draw(2 * i)[:set_rows], draw(2 * i + 1)[:set_rows], widths)
        values.append(distance * set_rows / count)
    return mean_sd(values)


def kid(x: Points, y: OtherPoints, *, subsets: int, subset_size: int, generator: Generator) -> tuple[float, float]:
    """MMD^2 by the cubic kernel over random subsets of rows: the mean over the subsets, and the sd.

    Subsets overlap, so the sd is the spread at their size, not the error of the mean. It is the KID of Binkowski et al.
    2018 where rows are features of Inception; name others after their features. Raises `UserError` if a side has fewer
    than `subset_size` rows.
    """
    if subset_size > min(len(x), len(y)):
        raise UserError(f"subsets of {subset_size} rows do not fit in {len(x)} and {len(y)}: give more samples")
    x = x.double()
    y = y.double()
    values: list[float] = []
    for _ in range(subsets):
        subset_x = pick_rows(x, subset_size, generator)
        subset_y = pick_rows(y, subset_size, generator)
        values.append(_unbiased(subset_x, subset_y, _cubic_kernel))
    return mean_sd(values)


def pick_rows(x: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` rows of x at random, without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:count]]


def block_rows(columns: int) -> int:
    """How many rows of a kernel matrix with this many columns fit into a block."""
    return max(1, BLOCK // columns)


def _mean_gaussian_kernel(widths: Sequence[float]) -> Kernel:
    """The mean of Gaussian kernels of these widths."""

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
    """Unbiased MMD^2 of rows x and y by a kernel; the sizes may differ."""
    n = len(x)
    m = len(y)
    between = sum(kernel(block, y).sum().item() for block in x.split(block_rows(m)))
    mean_within_x = _sum_within(x, kernel) / (n * (n - 1))
    mean_within_y = _sum_within(y, kernel) / (m * (m - 1))
    return mean_within_x + mean_within_y - 2 * between / (n * m)


def _sum_within(x: Tensor, kernel: Kernel) -> float:
    """The sum of k(x_i, x_j) over i != j. The kernel is symmetric, so blocks off the diagonal are computed once."""
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
    """MMD^2 times 1000 of the rows in `shared_classes`, weighed by the shares of the classes in the data.

    Without classes, where none is shared, and where one of the data has no sample, all rows are of one class. Each side
    needs 2 rows or more.
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
    return Estimate(SCALE * (fake_mean + real_mean), SCALE * (fake_variance + real_variance) ** 0.5)


def gaussian_mmd_null_sd(sample_c: SampleClasses, real: RealFeatures, width: float, real_c: RealClasses) -> float:
    """The sd of `gaussian_mmd` for samples that have the distribution of the data in each class.

    In one class its variance is 2 (1/n + 1/m)^2 E k(y, y')^2 of the kernel less its means over each row and column
    (Gretton et al. 2012, Theorem 12). In several classes (ours) the means are over the rows of a class, and a row of
    class c has the weight p_c (1/n_c + 1/m_c), which is 1/n + 1/m where samples have the shares of the data. The outer
    mean is over the pairs of some rows of the data (`_choose_null_rows`).
    """
    fake_one_hot, real_one_hot, shares = _one_hot_classes(sample_c, real_c)
    class_weights = shares * (1 / fake_one_hot.sum(0) + 1 / real_one_hot.sum(0))
    rows = _choose_null_rows(real_one_hot)
    y = (real[rows].double() - real.double().mean(0)) / width
    one_hot = real_one_hot[rows]
    counts = one_hot.sum(0).clamp(min=1)  # few rows may have none of a class
    # A row is in the mean of its class, which takes 1 / n of the variance of what is left.
    row_weights = (one_hot @ (class_weights * counts / (counts - 1).clamp(min=1))).to(y)
    # the kernel less its class means, over rows and columns
    subtract_class_means = (torch.eye(len(y)) - one_hot / counts @ one_hot.T).to(y)
    kernel = subtract_class_means @ (-torch.cdist(y, y).square() / 2).exp() @ subtract_class_means
    squares = kernel.square() * row_weights * row_weights[:, None]
    mean_square = (squares.sum() - squares.trace()).item() / (len(y) * (len(y) - 1))
    return SCALE * (2 * mean_square) ** 0.5


def _choose_null_rows(real_one_hot: Float64[Tensor, "m k"]) -> Int64[Tensor, " n"]:
    """The numbers of evenly spaced rows with a class, about `MAX_NULL_ROWS` at most, in the shares of the classes.

    Of a class that would keep less than two, all rows are taken or none. A row alone in its class is left out.
    """
    counted_rows = real_one_hot.any(1).nonzero()[:, 0]
    stride = -(-len(counted_rows) // MAX_NULL_ROWS)  # rounded up

    # a stride would leave less than two rows of a small class: every stride-th of these classes is taken whole
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
    """The mean of h (or g) over the n rows of one side, and that side's part of the variance.

    `within` and `between` are the sums of the kernel from each row to the rows of each of k classes, of its own side
    and the other. `one_hot` has a 1 for the class of each row, `other_counts` the rows of each class on the other side.
    """
    counts = one_hot.sum(0)
    mean_within = (within - one_hot) / (counts - one_hot)  # without the row itself, whose kernel is 1
    mean_between = between / other_counts
    h = (mean_within - mean_between) @ shares
    class_means = one_hot.T @ h / counts
    class_variances = one_hot.T @ (h - one_hot @ class_means).square() / (counts - 1) / counts
    return (shares @ class_means).item(), 4 * (shares.square() @ class_variances).item()


def _one_hot_classes(
    sample_c: SampleClasses, real_c: RealClasses
) -> tuple[Float64[Tensor, "n k"], Float64[Tensor, "m k"], Float64[Tensor, " k"]]:
    """The `shared_classes` of samples and data, one-hot, (n, k) and (m, k), and the classes' shares of the data (k,).

    Rows of other classes have no 1, and so no weight. All rows are of one class where no class is shared, and where one
    of the data has no sample: its images are lost, which counts.
    """
    classes = torch.tensor(shared_classes(sample_c, real_c))
    if len(classes) == 0 or lost_classes(sample_c, real_c):
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
    """Sums of exp(-|x_i - y_j|^2 / 2) by class: (n, k) from every x to the rows y, and (m, k) from every y to x."""
    rows = block_rows(len(y))
    half_squares = y.square().sum(1) / 2
    x_sums: list[Tensor] = []
    y_sums = torch.zeros_like(y_one_hot)
    for block, block_one_hot in zip(x.split(rows), x_one_hot.split(rows), strict=True):
        exponents = torch.addmm(-half_squares, block, y.T).sub_(block.square().sum(1, keepdim=True) / 2)
        kernel = exponents.exp_().cpu()  # the one-hot classes and all sums are on the CPU
        x_sums.append(kernel @ y_one_hot)
        y_sums += kernel.T @ block_one_hot
    return torch.cat(x_sums), y_sums


# ------------------------------------------------------------------------------------------------------- class by class


def class_mmd(
    fake: SampleFeatures, real: RealFeatures, width: float, sample_c: SampleClasses, real_c: RealClasses
) -> Estimate:
    """The mean over the `shared_classes`, of which there must be one, of MMD^2 times 1000 within the class."""
    classes = shared_classes(sample_c, real_c)
    value = 0.0
    variance = 0.0
    for label, share in zip(classes, class_shares(real_c, classes), strict=True):
        estimate = gaussian_mmd(fake[sample_c == label], real[real_c == label], width)
        value += share * estimate.value
        variance += share**2 * estimate.error**2
    return Estimate(value, variance**0.5)


def class_mmd_null_sd(sample_c: SampleClasses, real: RealFeatures, width: float, real_c: RealClasses) -> float:
    """The sd of `class_mmd` for samples that have the distribution of the data in each class.

    A class with too few rows for U-centring is taken to scatter as all rows together do.
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
    return SCALE * variance**0.5


def shared_classes(sample_c: SampleClasses, real_c: RealClasses) -> list[int]:
    """The classes that have two rows or more on both sides."""
    sample_counts = sample_c.cpu().bincount()
    real_counts = real_c.cpu().bincount(minlength=len(sample_counts))
    is_shared = torch.minimum(sample_counts, real_counts[: len(sample_counts)]) >= 2
    return is_shared.nonzero()[:, 0].tolist()


def lost_classes(sample_c: SampleClasses, real_c: RealClasses) -> list[int]:
    """The classes of the data of which there is no sample."""
    return sorted({*real_c.tolist()} - {*sample_c.tolist()})


def class_shares(real_c: RealClasses, classes: Sequence[int]) -> list[float]:
    """The share of each of `classes` among the data in these classes."""
    counts = [int((real_c == label).sum()) for label in classes]
    return [count / sum(counts) for count in counts]


def _centred_mean_square(y: Float64[Tensor, "n f"]) -> float:
    """E k~(y, y')^2 without bias, by evenly spaced rows of `y`, `MAX_NULL_ROWS` at most.

    There must be `MIN_CENTRED_ROWS` rows or more, in units of the kernel's width.
    """
    stride = -(-len(y) // MAX_NULL_ROWS)
    y = y[::stride]
    n = len(y)
    kernel = (-torch.cdist(y, y).square() / 2).exp().fill_diagonal_(0)
    means = kernel.sum(1) / (n - 2)  # U-centring: the diagonal is left out of all means
    centred = kernel - means[:, None] - means + kernel.sum() / ((n - 1) * (n - 2))
    centred.fill_diagonal_(0)
    return centred.square().sum().item() / (n * (n - 3))


# ----------------------------------------------------------------------------------------------- scores of a protocol


def mmd_scores(
    fake: SampleFeatures, real: RealFeatures, *, width: float, sample_c: SampleClasses, real_c: RealClasses
) -> Scores:
    """The scores `mmd` and, where samples are judged by class, `class_mmd`.

    Each comes with its standard error, as `mmd_sd` and `class_mmd_sd`.
    """
    if not _is_judged_by_class(sample_c, real_c):
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
    """`class_mmd` if all of the noise stood for the samples of each class; {} where samples are not judged by class."""
    if not _is_judged_by_class(sample_c, real_c):
        return {}
    classes = shared_classes(sample_c, real_c)
    distances = [gaussian_mmd(noise, real[real_c == k], width).value for k in classes]
    shares = class_shares(real_c, classes)
    return {CLASS_MMD: sum(share * distance for share, distance in zip(shares, distances, strict=True))}


def perfect_mmd_scores(real: RealFeatures, *, width: float, sample_c: SampleClasses, real_c: RealClasses) -> Scores:
    """The scores of `mmd_scores` expected from a perfect sampler, and their sd.

    As in any baseline of evaluation.json, `mmd` and its sd, which come first, are called `mean` and `sd`.
    """
    if not _is_judged_by_class(sample_c, real_c):
        sd = gaussian_mmd_null_sd(torch.zeros_like(sample_c), real, width, torch.zeros_like(real_c))
        return {"mean": 0.0, "sd": sd}
    return {
        "mean": 0.0,
        "sd": gaussian_mmd_null_sd(sample_c, real, width, real_c),
        CLASS_MMD: 0.0,
        f"{CLASS_MMD}_sd": class_mmd_null_sd(sample_c, real, width, real_c),
    }


def class_facts(sample_c: SampleClasses, real_c: RealClasses) -> dict[str, str]:
    """A report's fact about which classes `class_mmd` leaves out; {} where it leaves out none."""
    if not _has_classes(sample_c):
        return {}
    classes = {*sample_c.tolist(), *real_c.tolist()}
    shared = shared_classes(sample_c, real_c)
    left_out = sorted(classes - {*shared})
    if not left_out:
        return {}
    names = first_few(left_out, max_items=MAX_NAMED)
    if len(left_out) > MAX_NAMED:
        names += f" (hash {digest.short(*map(str, left_out))})"  # cards of other classes differ
    return {
        CLASS_MMD: f"over {len(shared)} of {len(classes)} classes, without {names}, which have fewer than 2 images on "
        "a side"
    }


def _is_judged_by_class(sample_c: SampleClasses, real_c: RealClasses) -> bool:
    return _has_classes(sample_c) and bool(shared_classes(sample_c, real_c))


def _has_classes(c: SampleClasses) -> bool:
    """Whether not all rows are of one class, as they are in data without classes."""
    return bool((c != c[0]).any())


# ---------------------------------------------------------------------------------- what a perfect sampler would have


def full_scale(n: int, m: int) -> float:
    """The scale of a squared distance between all of n and m rows."""
    return 1 / n + 1 / m


def subset_scale(num_subsets: int, subset_rows: int) -> Scale:
    """The scale of the mean of a kernel distance over random subsets of `subset_rows` rows of either side.

    Given all rows, the subsets are independent, and the expected distance of each is that of all rows. So the variance
    of their mean is, by the law of total variance,

        var(all rows) + (var(one subset) - var(all rows)) / num_subsets
    """

    def scale(n: int, m: int) -> float:
        of_all = full_scale(n, m)
        of_subset = full_scale(subset_rows, subset_rows)
        return (of_all**2 + (of_subset**2 - of_all**2) / num_subsets) ** 0.5

    return scale


class NullDistance(NamedTuple):
    """The squared distance of two independent samples of one distribution, of n and m rows, over its scale.

    The mean and the sd of this ratio depend on neither n nor m (`measure_null_distance`).
    """

    mean: float
    sd: float

    def scaled_to(self, num_samples: int, num_real: int, scale: Scale = full_scale) -> tuple[float, float]:
        """The mean and the sd of the distance, of this scale, between `num_samples` and `num_real` rows."""
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
    """Compare disjoint random parts of the data, large ones and ones half as large, with each other.

    `real_c` (m,) are the classes of the data, and `distance`, of this `scale`, takes the row numbers of two parts. At
    least `pairs` pairs are compared. Draws are keyed by `kind`. Returns None if the small parts would have fewer than
    `min_part_rows` rows.

    Why the ratio depends on neither number of rows (ours; measured on digits from 128 rows to 898): moments of n rows
    are off by an error that falls as 1 / sqrt(n), and distances are squares of such errors, so

        FD(n) = FD_inf + bias / n    (Chong & Forsyth 2020, arXiv 1911.07023, Sec. 4)

    Between n and m rows of one distribution FD_inf is 0, and 1/n becomes 1/n + 1/m.

    Samples are made with the classes in turn, so each part has its share of each class. Random parts would also differ
    in their counts of the classes, on digits by more than in all else.
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
            for a, b in zip(parts[::2], parts[1::2], strict=False):  # the last of an odd number has no partner
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
    """The scores of a perfect sampler that makes images of the classes `sample_c`, each with its sd.

    They are `mmd`, as `mean` and `sd`; `class_mmd`, if samples are judged by class; and `fd`, if there are rows enough
    to estimate it, and never where `with_frechet` is false. `real` are features of the data in classes `real_c` (m,),
    `width` is that of the Gaussian kernel. Kernel distances compare with the rows `kernel_rows`; None: with all.
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
    """Split the rows of c (n,), at random, into disjoint parts; returns the row numbers of each part.

    The parts have as many rows, and as many rows of each class, give or take one.
    """
    order = torch.randperm(len(c), generator=generator)
    order = order[c[order].argsort(stable=True)]
    return [order[i::num_parts] for i in range(num_parts)]
