"""Mean and covariance of a stream of rows, in float64, that can be merged.

With the scatter S = sum_i (x_i - mean)(x_i - mean)^T, two disjoint parts a and b of a data set give

    n = n_a + n_b,   delta = mean_b - mean_a,
    mean = mean_a + delta n_b / n,   S = S_a + S_b + delta delta^T n_a n_b / n,

an identity, so any split over batches or ranks gives the same moments up to rounding (Chan, Golub & LeVeque 1983).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dumo.types import UserError


@dataclass(frozen=True)
class Moments:
    """The first two moments of `count` rows of d numbers; no rows at all is the neutral element of `+`."""

    count: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]  # sum of the outer products of the deviations from the mean

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> "Moments":
        """The moments of these rows; n may be 0."""
        x = features.double()
        mean = x.sum(0) / max(len(x), 1)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together (Chan, Golub & LeVeque 1983)."""
        count = self.count + other.count
        share, delta = other.count / max(count, 1), other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * self.count * share
        return Moments(count, self.mean + delta * share, scatter)

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance, scatter / (count - 1). Raises `UserError` for fewer than 2 rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs 2 rows or more, here are {self.count}: give more samples")
        return self.scatter / (self.count - 1)
