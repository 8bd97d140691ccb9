"""The Fréchet distance between two sets of rows, and the moments that it takes.

`Moments.of` computes the moments of a batch of rows, `+` merges those of several batches or ranks, and
`frechet_distance` compares two of them. `pixel_frechet` does all of it for images, on their reduced pixels.

**Moments.** With the scatter M = sum_i (x_i - mean)(x_i - mean)^T, two disjoint sets of rows a and b have together

    n     = n_a + n_b
    mean  = mean_a + delta n_b / n                      delta = mean_b - mean_a
    M     = M_a + M_b + delta delta^T n_a n_b / n       (Chan, Golub & LeVeque 1983)

This is an identity, so any split over batches or ranks gives the same moments up to rounding.

**Distance.** Between two Gaussians of covariances S = M / (n - 1), squared, as is the custom (Dowson & Landau 1982):

    d^2 = |mean_a - mean_b|^2 + tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2

On features of Inception it is the FID (Heusel et al. 2017, Eq. 6). On any others it is named after those.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.types import UserError

Images = Float[Tensor, "n c h w"]

PIXEL_SIDE = 8  # pixels a side that images are reduced to at most, where pixels are compared: ours
POOLED_IMAGES = 256  # images that are reduced at a time: ours


@dataclass(frozen=True)
class Moments:
    """The first two moments of `count` rows of d numbers; no rows at all is the neutral element of `+`."""

    count: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]  # sum of the outer products of the deviations from the mean

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> "Moments":
        """The moments of these rows, in float64; n may be 0."""
        x = features.double()
        mean = x.sum(0) / max(len(x), 1)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together."""
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
    """d^2 >= 0 in the square of the features' unit, in float64.

    With n rows it is biased upwards, by about a constant over n: compare at equal n only. Raises `UserError` where a
    and b have different numbers of features, or one has no more rows than features.
    """
    num_features = len(a.mean)
    if len(b.mean) != num_features:
        raise UserError(f"rows of {num_features} features and rows of {len(b.mean)} have no distance: give equal ones")
    for moments in (a, b):
        if moments.count <= num_features:
            raise UserError(
                f"{moments.count} samples cannot give a covariance of {num_features} features: a Fréchet distance "
                f"needs more than {num_features}, give more samples"
            )
    root_a = _symmetric_root(a.covariance)
    root_trace = torch.linalg.eigvalsh(root_a @ b.covariance @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    return max(distance.item(), 0.0)  # rounding can make it negative for equal moments


def _symmetric_root(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The symmetric square root of a covariance. Eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def pixel_frechet(x: Images, y: Float[Tensor, "m c _ _"], side: int = PIXEL_SIDE) -> float:
    """d^2 >= 0 between the reduced pixels of images x and y, in float64.

    It sees the light, the colours and the coarse layout, and no detail. Raises `UserError` where x or y are no more
    images than the numbers that are compared, c * side^2, and where one of them is smaller than `side` and the other
    has another size.
    """
    return frechet_distance(Moments.of(reduce_pixels(x, side)), Moments.of(reduce_pixels(y, side)))


def reduce_pixels(x: Images, side: int = PIXEL_SIDE) -> Float64[Tensor, "n d"]:
    """The images as rows of d = c * side^2 means over areas of their pixels. Smaller images keep their size."""
    size = (min(side, x.shape[2]), min(side, x.shape[3]))
    pooled = [adaptive_avg_pool2d(images.double(), size) for images in x.cpu().split(POOLED_IMAGES)]
    return torch.cat(pooled).flatten(1)
