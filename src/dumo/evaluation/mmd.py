"""Kernel distances between two sets of rows: the unbiased MMD^2, of sums of Gaussian kernels or of the cubic kernel.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

It is 0 exactly when x and y have one distribution, for a Gaussian kernel. The pairs of a row with itself are left out,
so that the estimate is unbiased (Gretton et al. 2012, Eq. 3); it may therefore be negative.

- `mmd2` uses Gaussian kernels of several widths; `null_spread` says how it scatters where nothing differs.
- `kid` uses the cubic kernel, over random subsets. `pick_rows` draws one.

`dumo.evaluation.class_mmd` has MMD^2 with standard errors, for rows that have classes. It also uses `block_rows`.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dumo.evaluation.estimate import mean_sd
from dumo.types import UserError

Points = Float[Tensor, "n d"]
OtherPoints = Float[Tensor, "m d"]
Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, d), (m, d) -> (n, m)

BLOCK = 2**19  # numbers per block of a kernel matrix: 4 MB, about a processor's cache


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
