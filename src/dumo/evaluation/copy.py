"""Detect samples that are copies of training images, by nearest neighbours among thumbnails.

`thumbnails` reduces images, which suppresses noise and small shifts, and `nearest_images` compares them. The protocol
`photos` scores the share of copies, and the report shows each sample next to its nearest image.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.evaluation.neighbours import BLOCK, pair_distances

# The largest side of a thumbnail in pixels (our choice).
THUMB_SIDE = 16
# A sample is a copy if the ratio of its distances to the nearest and second nearest image is below this (our choice).
COPY_RATIO = 1 / 3

Thumbs = Float[Tensor, "n c h w"]


@dataclass(frozen=True)
class NearestImages:
    """The nearest real images of m fake images.

    distances: to the nearest and the second nearest real image; nan if there is no second one.
    indices: of the nearest real image.
    is_mirrored: whether the nearest real image is mirrored.
    """

    distances: Float64[Tensor, "m 2"]
    indices: Int64[Tensor, " m"]
    is_mirrored: Bool[Tensor, " m"]

    @property
    def is_copy(self) -> Bool[Tensor, " m"]:
        """Whether each fake image is far closer to its nearest real image than to the second nearest."""
        return self.distances[:, 0] < COPY_RATIO * self.distances[:, 1]


def thumbnails(x: Float[Tensor, "n c height width"]) -> Thumbs:
    """Reduce images to squares with sides of at most THUMB_SIDE pixels, by average pooling."""
    return adaptive_avg_pool2d(x, min(THUMB_SIDE, *x.shape[2:]))


def nearest_images(
    real: Thumbs, fake: Float[Tensor, "m c h w"], *, left_out: Int64[Tensor, " m"] | None = None, mirror: bool = True
) -> NearestImages:
    """Find the nearest `real` thumbnail for each `fake` thumbnail, by Euclidean distance.

    left_out: for each fake image, the index of a real image to ignore. If the fakes are real images themselves, pass
    their own indices.
    mirror: also compare with mirrored real images.

    At least one real image must remain for each fake image.
    """
    real_rows = real.double().flatten(1)
    mirrored_rows = real.flip(-1).double().flatten(1)
    distances_by_block: list[Tensor] = []
    indices_by_block: list[Tensor] = []
    is_mirrored_by_block: list[Tensor] = []
    for block, fake_rows in enumerate(fake.double().flatten(1).split(BLOCK)):
        distances = pair_distances(fake_rows, real_rows)
        is_mirrored = torch.zeros_like(distances, dtype=torch.bool)
        if mirror:
            mirrored_distances = pair_distances(fake_rows, mirrored_rows)
            is_mirrored = mirrored_distances < distances
            distances = torch.minimum(distances, mirrored_distances)
        rows = torch.arange(len(fake_rows))
        if left_out is not None:
            distances[rows, left_out[block * BLOCK + rows]] = torch.inf
        nearest, indices = distances.topk(min(2, distances.shape[1]), largest=False)
        next_nearest = nearest[:, 1:].masked_fill(nearest[:, 1:].isinf(), torch.nan)
        if next_nearest.shape[1] == 0:
            next_nearest = torch.full_like(nearest, torch.nan)
        distances_by_block.append(torch.cat([nearest[:, :1], next_nearest], 1))
        indices_by_block.append(indices[:, 0])
        is_mirrored_by_block.append(is_mirrored[rows, indices[:, 0]])
    return NearestImages(
        distances=torch.cat(distances_by_block),
        indices=torch.cat(indices_by_block),
        is_mirrored=torch.cat(is_mirrored_by_block),
    )
