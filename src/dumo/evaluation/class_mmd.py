"""MMD^2 by a Gaussian kernel, times 1000, with its standard error, between samples and data that have classes or none.

- `gaussian_mmd` compares samples with the data as a whole.
- `class_mmd` compares them class by class: the mean of the classes' MMD^2, weighed by their shares of the data
  (`class_shares`).
- `gaussian_mmd_null_sd` and `class_mmd_null_sd` are the sd of each where samples have the distribution of the data.

In every function `fake` are samples x, n_c of them in class c, `real` are data y, m_c in class c, `width` is the
kernel's, and `sample_c`, `real_c` are the classes. Only classes with two rows or more on both sides count
(`shared_classes`), and p_c is the share of class c in the data of these. Times 1000 is as in Jayasumana et al. 2024
(CMMD). `dumo.evaluation.mmd` has MMD^2 without classes, and says what it is.

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

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.evaluation.estimate import Estimate
from dumo.evaluation.mmd import block_rows
from dumo.types import Cond

SampleFeatures = Float[Tensor, "n f"]
RealFeatures = Float[Tensor, "m f"]
SampleClasses = Int64[Tensor, " n"]
RealClasses = Int64[Tensor, " m"]

SCALE = 1000  # of every value and error here: CMMD
MAX_NULL_ROWS = 2000  # rows from whose pairs a null sd is computed, to a hundredth: ours
MIN_CENTRED_ROWS = 4  # rows that U-centring needs: it divides by n - 3


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
