"""Precision and recall by nearest neighbours, and the nearest data of a sample.

`precision_recall` compares two sets of features. `nearest` and `nearest_other` are distances to the nearest rows;
`pair_distances` are those of all pairs. All are exact: `_estimate_gaps` estimates all pairs, then `_nearest` and
`_share` measure those that it leaves open.

A set of points stands for the region it covers: a ball around each, out to its k-th nearest neighbour in the set.
Precision is the share of fakes in the region of the data, recall the share of data in the region of the fakes
(Kynkäänniemi et al. 2019, Eqs. 1, 2). Blur and noise lower precision, missing modes lower recall.

Distances are computed from differences, in float64. Of all pairs, 50,000 with 50,000 of 2048 features, that takes hours
on a CPU. So products of matrices in float32 first estimate all distances, by |x|^2 + |c|^2 - 2 x.c, and only the pairs
that their rounding leaves open are measured: every answer equals that of measuring all pairs.

Rows are taken about the mean of the centres, in units of the longest, so that nothing over- or underflows. Let X, C be
the longest row and centre, R the largest radius, u = 2^-24 and g(n) = n u / (1 - n u). A sum of d + 1 products, in any
order, is off by at most g(d + 1) times the sum of their sizes (Higham 2002, Eq. 3.5), here 2 X C + C^2 + R^2. Rows
rounded to float32 move a product by u (X + C)^2; what is added is rounded twice, with its sum three times; float64 and
what would underflow stay far below one u. So |x - c|^2 - r^2 is known to within g(d + 16) ((X + C)^2 + R^2).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.flow.precision import using
from dumo.types import UserError

Real = Float[Tensor, "n *d"]
Fake = Float[Tensor, "m *d"]

NUM_NEIGHBOURS = 3  # of precision and recall, by which all protocols measure them (Kynkäänniemi et al. 2019)
BLOCK = 512  # rows per block of distances: ours
SPARE = 12  # rows measured besides the k nearest, so that rounding seldom leaves one of them open: ours
MAX_PAIRS = 4096  # pairs that are measured at a time: ours
BY_DIFFERENCES = "donot_use_mm_for_euclid_dist"  # a copy is at distance 0, not at the root of a rounding error


def precision_recall(real: Real, fake: Fake, k: int = NUM_NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall, shares in [0, 1], by the k-th nearest neighbours.

    Raises `UserError` if a side has no more than k rows.
    """
    if k >= min(len(real), len(fake)):
        raise UserError(
            f"{k} neighbours need more than {k} rows, here are {len(real)} and {len(fake)}: give more samples"
        )
    real = real.flatten(1)
    fake = fake.flatten(1)
    precision = _share(fake, real, _radii(real, k))
    recall = _share(real, fake, _radii(fake, k))
    return precision, recall


def nearest(real: Real, fake: Fake) -> tuple[Float64[Tensor, " m"], Int64[Tensor, " m"]]:
    """For each fake its nearest real row: the Euclidean distance over all axes but the first, and the row's index."""
    distances, indices = _nearest(fake.flatten(1), real.flatten(1), 1)
    return distances[:, 0], indices[:, 0]


def nearest_other(x: Real, rows: Int64[Tensor, " m"]) -> Float64[Tensor, " m"]:
    """The distance (m,) of the given rows of x to their nearest other row of x, which has 2 rows at least."""
    x = x.flatten(1)
    distances, _ = _nearest(x[rows], x, 2)
    return distances[:, 1]  # the row itself, at 0, comes first


def _radii(x: Tensor, k: int) -> Tensor:
    """The distance (n,) of every row to its k-th nearest other row."""
    distances, _ = _nearest(x, x, k + 1)
    return distances[:, k]  # the row itself, at 0, comes first


def _nearest(x: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For every row of x its k nearest centres in their order: distances (n, k) and indices (n, k)."""
    num_candidates = min(k + SPARE, len(centres))
    all_distances: list[Tensor] = []
    all_indices: list[Tensor] = []
    for block in _estimate_gaps(x, centres, centres.new_zeros(len(centres))):
        # measure the candidates, which are nearest by their estimates
        rows = block.rows
        candidates = block.gaps.topk(num_candidates, largest=False)
        candidate_distances = pair_distances(rows[:, None], centres[candidates.indices])[:, 0]
        distances, order = candidate_distances.topk(k, largest=False)
        indices = candidates.indices.gather(1, order)

        # measure all where one that is no candidate may be nearer
        is_sure = candidates.values[:, -1] - block.max_error > (distances[:, -1] * block.unit) ** 2
        if num_candidates < len(centres) and not is_sure.all():
            distances[~is_sure], indices[~is_sure] = pair_distances(rows[~is_sure], centres).topk(k, largest=False)
        all_distances.append(distances)
        all_indices.append(indices)
    return torch.cat(all_distances), torch.cat(all_indices)


def _share(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of the rows of x that lie in a ball around one of the centres, of the radius of that centre."""
    inside_by_block: list[Tensor] = []
    for block in _estimate_gaps(x, centres, radii):
        is_inside = block.gaps.amin(1) < -block.max_error
        undecided = (~is_inside).nonzero().flatten()
        is_outside = block.gaps[undecided] > block.max_error  # False of NaN: such a pair is measured, too
        row, centre = (~is_outside).nonzero(as_tuple=True)
        for i, j in zip(undecided[row].split(MAX_PAIRS), centre.split(MAX_PAIRS), strict=True):
            is_in_ball = pair_distances(block.rows[i, None], centres[j, None]).flatten() <= radii[j]
            is_inside[i[is_in_ball]] = True
        inside_by_block.append(is_inside)
    return torch.cat(inside_by_block).double().mean().item()


class _Block(NamedTuple):
    """Some rows of x, and estimates for the pairs of each with each of m centres, whose balls have the radii r."""

    rows: Tensor  # (n, d)
    gaps: Tensor  # (n, m): |x - c|^2 - r^2, where all lengths are multiplied by `unit`
    max_error: float  # of a gap, at most; not finite where a number is not
    unit: float


def _estimate_gaps(x: Tensor, centres: Tensor, radii: Tensor) -> Iterator[_Block]:
    """Estimate, block by block, how far the rows of x are outside of the balls around the centres."""
    middle = centres.mean(0, dtype=torch.float64)
    row_lengths = _lengths(x, middle)
    centre_lengths = _lengths(centres, middle)
    longest = torch.maximum(row_lengths.max(), centre_lengths.max()).item()
    unit = 2.0 ** -max(math.frexp(longest)[1], -1000)  # a power of two rounds nothing
    row_lengths = row_lengths * unit
    centre_lengths = centre_lengths * unit
    square_radii = (radii.double() * unit) ** 2
    square_sizes = (row_lengths.max() + centre_lengths.max()) ** 2 + square_radii.max()
    max_error = _gamma(x.shape[1] + 16) * square_sizes.item()
    c = torch.cat([_in_unit(part, middle, unit) for part in centres.split(BLOCK)])
    centre_terms = (centre_lengths**2 - square_radii).float()
    row_terms = (row_lengths**2).float()
    for part, square_lengths in zip(x.split(BLOCK), row_terms.split(BLOCK), strict=True):
        with using("fp32", x.device):
            products = torch.addmm(centre_terms, _in_unit(part, middle, unit), c.mT, alpha=-2)
        yield _Block(part, products.add_(square_lengths[:, None]), max_error, unit)


def _lengths(x: Tensor, middle: Tensor) -> Tensor:
    """How far each row is from the middle, in float64."""
    return torch.cat([torch.linalg.vector_norm(part - middle, dim=1) for part in x.split(BLOCK)])


def _in_unit(x: Tensor, middle: Tensor, unit: float) -> Tensor:
    """Rows about the middle, in this unit, in float32."""
    return ((x - middle) * unit).float()


def _gamma(n: int) -> float:
    """How far a sum of n products of float32 can be off, for a sum of sizes of 1 (Higham 2002, Lemma 3.1)."""
    u = 2.0**-24
    return n * u / (1 - n * u)


def pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances in float64, (..., n, d), (..., m, d) -> (..., n, m)."""
    return torch.cdist(a.double(), b.double(), compute_mode=BY_DIFFERENCES)
