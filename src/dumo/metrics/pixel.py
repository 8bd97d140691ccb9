"""The Fréchet distance between the pixels of two sets of images, reduced: what no network sees, and none can miss.

Means over squares of pixels are compared as Gaussians (`dumo.metrics.frechet`): the light, the colours and the coarse
layout, no detail. It is squared and summed over the reduced pixels, in the unit of the images, [-1, 1].
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.metrics.frechet import frechet_distance
from dumo.metrics.moments import Moments

SIDE = 8  # pixels: at most so many a side are compared. Ours

Images = Float[Tensor, "n c h w"]


def pixel_frechet(x: Images, y: Float[Tensor, "m c _ _"], side: int = SIDE) -> float:
    """d^2 >= 0 between the Gaussians of the reduced pixels of x and y, in float64.

    Raises `UserError` where a side has no more images than numbers that are compared, c * side^2.
    """
    return frechet_distance(Moments.of(reduced(x, side)), Moments.of(reduced(y, side)))


def reduced(x: Images, side: int = SIDE) -> Float64[Tensor, "n d"]:
    """The images as rows of c * side^2 numbers, the means over areas; as they are where they are no larger."""
    height, width = (min(side, length) for length in x.shape[2:])
    small = [adaptive_avg_pool2d(part.double(), (height, width)) for part in x.cpu().split(256)]
    return torch.cat(small).flatten(1)
