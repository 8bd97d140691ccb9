"""Precision and recall by nearest neighbours (Kynkäänniemi et al. 2019), and distances to the nearest data.

The support of a set of points is estimated by balls around each point that extend to its k-th nearest neighbour in the
set. Precision is the share of fake points in the support of the real ones, and recall the share of real points in the
support of the fake ones (Eqs. 1, 2). Blur and noise lower precision, missing modes lower recall.

Distances are computed in two steps, in float64. Matrix products, |x|^2 + |c|^2 - 2 x.c, find the nearest centres of
each row. Their distances are then recomputed from differences, so that the distance of a copy is exactly 0.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.types import UserError

Real = Float[Tensor, "n *d"]
Fake = Float[Tensor, "m *d"]

# The number of neighbours of precision and recall in all protocols (Kynkäänniemi et al. 2019).
NUM_NEIGHBOURS = 3
# The number of rows per block of distances.
BLOCK = 512
# Candidates besides the k nearest, since rounding can change the order of equal distances.
SPARE = 4


def precision_recall(real: Real, fake: Fake, k: int = NUM_NEIGHBOURS) -> tuple[float, float]:
    """Compute precision and recall, in [0, 1], with the k-th nearest neighbours.

    Raises UserError unless both sides have more than k rows.
    """
    if k >= min(len(real), len(fake)):
        raise UserError(f"{k} neighbours need more than {k} rows, got {len(real)} and {len(fake)}: give more samples")
    real = real.flatten(1)
    fake = fake.flatten(1)
    precision = _share_inside(fake, real, _radii(real, k))
    recall = _share_inside(real, fake, _radii(fake, k))
    return precision, recall


def nearest(real: Real, fake: Fake) -> tuple[Float64[Tensor, " m"], Int64[Tensor, " m"]]:
    """Return the Euclidean distance and the index of the nearest real row for each fake row."""
    distances, indices = _nearest(fake.flatten(1), real.flatten(1), 1)
    return distances[:, 0], indices[:, 0]


def nearest_other(x: Real, rows: Int64[Tensor, " m"]) -> Float64[Tensor, " m"]:
    """Return the distances (m,) of the given rows of x to their nearest other row. x must have 2 rows or more."""
    x = x.flatten(1)
    distances, _ = _nearest(x[rows], x, 2)
    # The first neighbour is the row itself.
    return distances[:, 1]


def _radii(x: Tensor, k: int) -> Tensor:
    """Return the distance (n,) of every row to its k-th nearest other row."""
    distances, _ = _nearest(x, x, k + 1)
    # The first neighbour is the row itself.
    return distances[:, k]


def _nearest(x: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the sorted distances (n, k) and the indices (n, k) of the k nearest centres of every row of x."""
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
    """Return the share of the rows of x that lie in at least one of the balls with these centres and radii."""
    num_inside = 0
    middle = centres.double().mean(0)
    for rows in x.split(BLOCK):
        gaps = _square_distances(rows, centres, middle) - radii.square()
        candidates = gaps.topk(min(1 + SPARE, len(centres)), largest=False).indices
        distances = pair_distances(rows[:, None], centres[candidates])[:, 0]
        num_inside += int((distances <= radii[candidates]).any(1).sum())
    return num_inside / len(x)


def _square_distances(x: Tensor, centres: Tensor, middle: Tensor) -> Tensor:
    """Compute squared distances (n, m) by matrix products in float64. Subtracting `middle` reduces rounding errors."""
    x = x.double() - middle
    centres = centres.double() - middle
    products = torch.addmm(centres.square().sum(1), x, centres.mT, alpha=-2)
    return products.add_(x.square().sum(1, keepdim=True))


def pair_distances(a: Tensor, b: Tensor) -> Tensor:
    """Compute Euclidean distances from differences in float64: (..., n, d), (..., m, d) -> (..., n, m)."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
