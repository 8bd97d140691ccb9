"""The Fréchet distance between two sets of features, each taken for a Gaussian.

The 2-Wasserstein distance between two Gaussians has a closed form (Dowson & Landau 1982):

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1^1/2 S_2 S_1^1/2)^1/2.

On features of the Inception network it is the FID (Heusel et al. 2017, Eq. 6). On any other features it is a
different number with the same formula, and is named after those features. It is squared here, as is the custom.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from dumo.metrics.moments import Moments
from dumo.types import UserError


def frechet_distance(a: Moments, b: Moments) -> float:
    """d^2 >= 0 in the square of the features' unit, in float64. Raises `UserError` where rows <= features.

    With n rows it is biased upwards, by about a constant over n: compare at equal n only.
    """
    width = len(a.mean)
    for moments in (a, b):
        if moments.count <= width:
            raise UserError(
                f"{moments.count} samples cannot give a covariance of {width} features:"
                f" a Fréchet distance needs more than {width}, give more samples"
            )
    root = _root(a.covariance)
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * product
    return max(distance.item(), 0.0)  # of equal moments, rounding can leave less than nothing


def _root(s: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The symmetric root of a covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
