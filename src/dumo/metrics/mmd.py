"""Distances between two sets of points by a kernel: the maximum mean discrepancy and the kernel distance of features.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) is 0 exactly when the two laws are equal, for a Gaussian kernel. Leaving
out the pairs of a point with itself makes the estimate unbiased (Gretton et al. 2012, Eq. 3), so it may be negative.
Sums run over blocks of rows: memory stays at a few blocks, whatever the number of points.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dumo.types import UserError

Points = Float[Tensor, "n d"]
Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, d), (m, d) -> (n, m)

BLOCK = 2**19  # numbers per block: 4 MB, about a processor's cache


def mmd2(x: Points, y: Float[Tensor, "m d"], widths: Sequence[float]) -> float:
    """Unbiased MMD^2 of the mean of Gaussian kernels exp(-|a - b|^2 / 2 w^2) over the widths w > 0, in float64.

    Dimensionless, at most 2. Raises `UserError` for fewer than 2 points on a side.
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
    return _mean_sd(values)


def kid(
    x: Points, y: Float[Tensor, "m d"], *, subsets: int, subset_size: int, generator: Generator
) -> tuple[float, float]:
    """Kernel distance of features: unbiased MMD^2 of (a.b / d + 1)^3 over random subsets, mean and sd over them.

    Binkowski et al. 2018 take Inception's features: with others, name them beside it. Subsets overlap,
    so the sd tells the spread at their size, not the error of the mean. Raises `UserError` if a side has too few rows.
    """
    if subset_size > min(len(x), len(y)):
        raise UserError(f"subsets of {subset_size} rows do not fit in {len(x)} and {len(y)}: give more samples")
    a, b = x.double(), y.double()
    values = [
        _unbiased(_pick(a, subset_size, generator), _pick(b, subset_size, generator), _cubic) for _ in range(subsets)
    ]
    return _mean_sd(values)


def kernel_distance(x: Points, y: Float[Tensor, "m d"]) -> float:
    """The kernel distance of `kid` between all of x and y. Raises `UserError` for fewer than 2 rows on a side."""
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
    """Gretton et al. 2012, Eq. 3, for two sets of possibly different sizes."""
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise UserError(
            f"an unbiased MMD^2 needs 2 points or more on each side, here are {n} and {m}: give more samples"
        )
    between = sum(kernel(part, y).sum().item() for part in x.split(_rows(m)))
    return _within(x, kernel) / (n * (n - 1)) + _within(y, kernel) / (m * (m - 1)) - 2 * between / (n * m)


def _within(x: Tensor, kernel: Kernel) -> float:
    """The sum of k(x_i, x_j) over i != j, each block beside the diagonal once."""
    total, rows = 0.0, _rows(len(x))
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        own = kernel(part, part)
        total += (own.sum() - own.trace() + 2 * kernel(part, x[first + rows :]).sum()).item()
    return total


def _rows(columns: int) -> int:
    """Rows of a block of so many columns."""
    return max(1, BLOCK // columns)


def _pick(x: Tensor, size: int, generator: Generator) -> Tensor:
    """Rows of x at random, without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:size]]


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased sd."""
    v = torch.tensor(values, dtype=torch.float64)
    return v.mean().item(), v.std().item()
