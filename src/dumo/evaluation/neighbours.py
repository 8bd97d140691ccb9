"""Precision and recall by nearest neighbours (Kynkäänniemi et al. 2019), and the nearest data of a sample.

A set of points stands for the region it covers: a ball around each, out to its k-th nearest neighbour in the set.
Precision is the share of fakes in the region of the data, recall the share of data in the region of the fakes
(Eqs. 1, 2). Blur and noise lower precision, missing modes lower recall.

Distances are computed in two steps, in float64. Products of matrices, by |x|^2 + |c|^2 - 2 x.c, find the nearest
centres of each row; the distances to these are then computed again from differences, so that a copy is at distance 0
and not at the root of a rounding error.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.types import UserError

Real = Float[Tensor, "n *d"]
Fake = Float[Tensor, "m *d"]

NUM_NEIGHBOURS = 3  # of precision and recall, by which all protocols measure them (Kynkäänniemi et al. 2019)
BLOCK = 512  # rows of a block of distances
SPARE = 4  # candidates besides the k nearest: rounding may order equal distances differently


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
    precision = _share_inside(fake, real, _radii(real, k))
    recall = _share_inside(real, fake, _radii(fake, k))
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
    all_distances: list[Tensor] = []
    all_indices: list[Tensor] = []
    middle = centres.double().mean(0)
    for rows in x.split(BLOCK):
        estimates = _square_distances(rows, centres, middle)
        candidates = estimates.topk(min(k + SPARE, len(centres)), largest=False).indices
        distances, order = pair_distances(rows[:, None], centres[candidates])[:, 0].topk(k, largest=False)
        all_distances.append(distances)
        all_indices.append(candidates.gather(1, order))
    return torch.cat(all_distances), torch.cat(all_indices)


def _share_inside(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of the rows of x that lie in a ball around one of the centres, of the radius of that centre."""
    num_inside = 0
    middle = centres.double().mean(0)
    for rows in x.split(BLOCK):
        gaps = _square_distances(rows, centres, middle) - radii.square()
        candidates = gaps.topk(min(1 + SPARE, len(centres)), largest=False).indices
        distances = pair_distances(rows[:, None], centres[candidates])[:, 0]
        num_inside += int((distances <= radii[candidates]).any(1).sum())
    return num_inside / len(x)


def _square_distances(x: Tensor, centres: Tensor, middle: Tensor) -> Tensor:
    """Squared distances (n, m) by products of matrices, in float64. Rows are taken about `middle`, to round less."""
    x = x.double() - middle
    centres = centres.double() - middle
    products = torch.addmm(centres.square().sum(1), x, centres.mT, alpha=-2)
    return products.add_(x.square().sum(1, keepdim=True))


def pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances in float64, computed from differences: (..., n, d), (..., m, d) -> (..., n, m)."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
