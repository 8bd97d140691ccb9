"""Precision and recall by nearest neighbours, and the nearest data of a sample.

A set of points stands for the region it covers: a ball around each, out to its k-th nearest neighbour in the set.
Precision is the share of fakes in the region of the data, recall the share of data in the region of the fakes
(Kynkäänniemi et al. 2019, Eqs. 1, 2). Blur and noise lower precision, missing modes lower recall.

What counts are distances by differences, in float64. Of all pairs, 50,000 with 50,000 of 2048 features, they take hours
on a CPU. So products of matrices in float32 say first which pairs matter, by |x|^2 + |c|^2 - 2 x.c, and only those that
their rounding leaves open are measured: the answers are those of measuring all, to the last one.

Rows are taken about the mean of the centres, in units of the longest, so that nothing over- or underflows. Let X, C be
the longest row and centre, R the largest radius, u = 2^-24 and g(n) = n u / (1 - n u). A sum of d + 1 products, in any
order, is off by at most g(d + 1) times the sum of their sizes (Higham 2002, Eq. 3.5), here 2 X C + C^2 + R^2. Rows
rounded to float32 move a product by u (X + C)^2; what is added is rounded twice, with its sum three times; float64 and
what would underflow stay far below one u. So |x - c|^2 - r^2 is known to within g(d + 16) ((X + C)^2 + R^2).
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.flow.precision import using
from dumo.types import UserError

Real = Float[Tensor, "n *d"]
Fake = Float[Tensor, "m *d"]
Images = Float[Tensor, "n c h w"]

BLOCK = 512  # rows per block of distances
SPARE = 12  # rows measured besides the k nearest, so that rounding seldom leaves one of them open: ours
PAIRS = 4096  # measured at a time
DIRECT = "donot_use_mm_for_euclid_dist"  # by differences: a copy is at distance 0, not at the root of a rounding error


def precision_recall(real: Real, fake: Fake, k: int = 3) -> tuple[float, float]:
    """Shares in [0, 1]; k = 3 is the source's. Raises `UserError` if a side has no k-th neighbour."""
    if k >= min(len(real), len(fake)):
        raise UserError(
            f"{k} neighbours need more than {k} rows, here are {len(real)} and {len(fake)}: give more samples"
        )
    real, fake = real.flatten(1), fake.flatten(1)
    return _share(fake, real, _radii(real, k)), _share(real, fake, _radii(fake, k))


def nearest(real: Real, fake: Fake) -> tuple[Float64[Tensor, " m"], Int64[Tensor, " m"]]:
    """For each fake its nearest real row: the Euclidean distance over all axes but the first, and the row's index."""
    distances, indices = _nearest(fake.flatten(1), real.flatten(1), 1)
    return distances[:, 0], indices[:, 0]


def nearest_other(x: Real, rows: Int64[Tensor, " m"]) -> Float64[Tensor, " m"]:
    """How far these rows of x are from the nearest other row. Needs 2 rows at least."""
    x = x.flatten(1)
    return _nearest(x[rows], x, 2)[0][:, 1]  # the row itself, at 0, comes first


def nearest_two(real: Images, fake: Float[Tensor, "m c h w"], *, same: bool = False) -> Float64[Tensor, "m 2"]:
    """How far each fake is from the nearest real image and from the next one, by their pixels, mirrored or not.

    `same`: the fakes are the real images, and each leaves out itself. Needs 2 other images at least.
    """
    x, mirrored = (side.double().flatten(1) for side in (real, real.flip(-1)))
    found: list[Tensor] = []
    for first, part in enumerate(fake.double().flatten(1).split(BLOCK)):
        away = torch.minimum(_distances(part, x), _distances(part, mirrored))
        if same:
            away[torch.arange(len(part)), first * BLOCK + torch.arange(len(part))] = torch.inf
        found.append(away.topk(2, largest=False).values)
    return torch.cat(found)


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of every row to its k-th nearest other row; the row itself, at 0, comes first."""
    return _nearest(x, x, k + 1)[0][:, k]


def _nearest(x: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For every row of x its k nearest centres in their order: distances (n, k) and indices (n, k)."""
    few = min(k + SPARE, len(centres))
    found: list[tuple[Tensor, Tensor]] = []
    for part, squares, off, unit in _estimates(x, centres, centres.new_zeros(len(centres))):
        near = squares.topk(few, largest=False)
        distances, order = _distances(part[:, None], centres[near.indices])[:, 0].topk(k, largest=False)
        indices = near.indices.gather(1, order)
        sure = near.values[:, -1] - off > (distances[:, -1] * unit) ** 2  # what is not among the few is farther
        if few < len(centres) and not sure.all():
            distances[~sure], indices[~sure] = _distances(part[~sure], centres).topk(k, largest=False)
        found.append((distances, indices))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _share(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of the rows of x that lie in a ball."""
    found: list[Tensor] = []
    for part, gaps, off, _ in _estimates(x, centres, radii):
        inside = gaps.amin(1) < -off
        left = (~inside).nonzero().flatten()
        row, centre = (~(gaps[left] > off)).nonzero(as_tuple=True)  # NaN, too, is open
        for i, j in zip(left[row].split(PAIRS), centre.split(PAIRS), strict=True):
            near = _distances(part[i, None], centres[j, None]).flatten() <= radii[j]
            inside[i[near]] = True
        found.append(inside)
    return torch.cat(found).double().mean().item()


def _estimates(x: Tensor, centres: Tensor, radii: Tensor) -> Iterator[tuple[Tensor, Tensor, float, float]]:
    """For blocks of rows of x: the rows, |x - c|^2 - r^2 to each centre (n, m), how far off it may be, and its unit.

    Lengths are multiplied by the unit. Where a number is not finite, how far off it may be is not either.
    """
    middle = centres.mean(0, dtype=torch.float64)
    lengths, away = _lengths(x, middle), _lengths(centres, middle)
    longest = torch.maximum(lengths.max(), away.max()).item()
    unit = 2.0 ** -max(math.frexp(longest)[1], -1000)  # a power of two rounds nothing
    lengths, away = lengths * unit, away * unit
    balls = (radii.double() * unit) ** 2
    off = _gamma(x.shape[1] + 16) * ((lengths.max() + away.max()) ** 2 + balls.max()).item()
    c = torch.cat([_small(part, middle, unit) for part in centres.split(BLOCK)])
    added = (away**2 - balls).float()
    for part, squares in zip(x.split(BLOCK), (lengths**2).float().split(BLOCK), strict=True):
        with using("fp32", x.device):
            products = torch.addmm(added, _small(part, middle, unit), c.mT, alpha=-2)
        yield part, products.add_(squares[:, None]), off, unit


def _lengths(x: Tensor, middle: Tensor) -> Tensor:
    """How far each row is from the middle, in float64."""
    return torch.cat([torch.linalg.vector_norm(part - middle, dim=1) for part in x.split(BLOCK)])


def _small(x: Tensor, middle: Tensor, unit: float) -> Tensor:
    """Rows about the middle, in this unit, in float32."""
    return ((x - middle) * unit).float()


def _gamma(n: int) -> float:
    """How far a sum of n products of float32 can be off, for a sum of sizes of 1 (Higham 2002, Lemma 3.1)."""
    u = 2.0**-24
    return n * u / (1 - n * u)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances in float64, (..., n, d), (..., m, d) -> (..., n, m)."""
    return torch.cdist(a.double(), b.double(), compute_mode=DIRECT)
