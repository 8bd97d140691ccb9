"""Precision and recall by nearest neighbours, and the nearest data of a sample.

A set of points stands for the region it covers: a ball around each, out to its k-th nearest neighbour in the set.
Precision is the share of fakes in the region of the data, recall the share of data in the region of the fakes
(Kynkäänniemi et al. 2019, Eqs. 1, 2). Blur and noise lower precision, missing modes lower recall.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.types import UserError

Real = Float[Tensor, "n *d"]
Fake = Float[Tensor, "m *d"]
Images = Float[Tensor, "n c h w"]

BLOCK = 512  # rows per block of distances
DIRECT = "donot_use_mm_for_euclid_dist"  # by differences: a copy is at distance 0, not at the root of a rounding error


def precision_recall(real: Real, fake: Fake, k: int = 3) -> tuple[float, float]:
    """Shares in [0, 1]; k = 3 is the source's. Raises `UserError` if a side has no k-th neighbour."""
    if k >= min(len(real), len(fake)):
        raise UserError(
            f"{k} neighbours need more than {k} rows, here are {len(real)} and {len(fake)}: give more samples"
        )
    real, fake = real.double().flatten(1), fake.double().flatten(1)
    return _share(fake, real, _radii(real, k)), _share(real, fake, _radii(fake, k))


def nearest(real: Real, fake: Fake) -> tuple[Float64[Tensor, " m"], Int64[Tensor, " m"]]:
    """For each fake its nearest real row: the Euclidean distance over all axes but the first, and the row's index."""
    real, fake = real.double().flatten(1), fake.double().flatten(1)
    blocks = [_distances(part, real).min(1) for part in fake.split(BLOCK)]
    return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])


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
    return torch.cat([_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(BLOCK)])


def _share(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of the rows of x that lie in a ball."""
    inside = [(_distances(part, centres) <= radii).any(1) for part in x.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances, (n, d), (m, d) -> (n, m)."""
    return torch.cdist(a, b, compute_mode=DIRECT)
