"""The Fréchet distance between two sets of rows, computed from their moments.

`Moments.of` computes the moments of a batch of rows, `+` merges moments of several batches or ranks, and
`frechet_distance` compares two sets. `pixel_frechet` compares the reduced pixels of images.

**Moments.** With the scatter M = sum_i (x_i - mean)(x_i - mean)^T, the union of two disjoint sets of rows a and b has

    n     = n_a + n_b
    mean  = mean_a + delta n_b / n                      delta = mean_b - mean_a
    M     = M_a + M_b + delta delta^T n_a n_b / n       (Chan, Golub & LeVeque 1983)

This is an identity, so any split over batches or ranks gives the same moments up to rounding.

**Distance.** The squared distance between two Gaussians with covariances S = M / (n - 1) (Dowson & Landau 1982) is

    d^2 = |mean_a - mean_b|^2 + tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2

With features of Inception it is the FID (Heusel et al. 2017, Eq. 6).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.types import UserError

Images = Float[Tensor, "n c h w"]

# The largest side, in pixels, of images that are compared by their pixels (our choice).
PIXEL_SIDE = 8
POOLING_BATCH_SIZE = 256


@dataclass(frozen=True)
class Moments:
    """The first two moments of `count` rows with d numbers. The neutral element of `+` has no rows."""

    count: int
    mean: Float64[Tensor, " d"]
    # The sum of the outer products of the deviations from the mean.
    scatter: Float64[Tensor, "d d"]

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> "Moments":
        """Compute the moments of these rows in float64; n may be 0."""
        x = features.double()
        mean = x.sum(0) / max(len(x), 1)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of the union of both sets of rows."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * self.count * share
        return Moments(count, self.mean + delta * share, scatter)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance, scatter / (count - 1), of 2 rows or more."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute d^2 >= 0 in float64.

    It is biased upwards, by about a constant over the number of rows n, so only compare distances at equal n. Raises
    UserError if a and b have different numbers of features, or if one does not have more rows than features.
    """
    num_features = len(a.mean)
    if len(b.mean) != num_features:
        raise UserError(f"a Fréchet distance needs equal numbers of features, got {num_features} and {len(b.mean)}")
    for moments in (a, b):
        if moments.count <= num_features:
            raise UserError(
                f"a Fréchet distance of {num_features} features needs more than {num_features} samples, got "
                f"{moments.count}: give more samples"
            )
    root_a = _symmetric_root(a.covariance)
    root_trace = torch.linalg.eigvalsh(root_a @ b.covariance @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    # Rounding can make the distance of equal moments negative.
    return max(distance.item(), 0.0)


def _symmetric_root(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """Compute the symmetric square root of a covariance. Eigenvalues that are negative by rounding are clamped to 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def pixel_frechet(x: Images, y: Float[Tensor, "m c _ _"], side: int = PIXEL_SIDE) -> float:
    """Compute d^2 >= 0 between the reduced pixels of images x and y in float64.

    It depends on brightness, colours and coarse layout, but not on detail. Raises UserError if x or y do not have more
    images than the c * side^2 reduced pixels, or if images smaller than `side` differ in size.
    """
    return frechet_distance(Moments.of(reduce_pixels(x, side)), Moments.of(reduce_pixels(y, side)))


def reduce_pixels(x: Images, side: int = PIXEL_SIDE) -> Float64[Tensor, "n d"]:
    """Average-pool images to rows of d = c * side^2 numbers. Smaller images keep their size."""
    size = (min(side, x.shape[2]), min(side, x.shape[3]))
    pooled = [adaptive_avg_pool2d(images.double(), size) for images in x.cpu().split(POOLING_BATCH_SIZE)]
    return torch.cat(pooled).flatten(1)
