"""Copies: the image of the data that a sample is nearest to, and whether the sample is that image again.

`thumbnails` reduces images, so that noise and small shifts count for little; `nearest_images` compares thumbnails. The
protocol `photos` scores the share of copies, and the report shows each sample next to its nearest image.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.evaluation.neighbours import BLOCK, pair_distances

THUMB_SIDE = 16  # pixels a side of a thumbnail, at most: ours
COPY_RATIO = 1 / 3  # a copy is nearer to one image than this share of its distance to the next one: ours

Thumbs = Float[Tensor, "n c h w"]


@dataclass(frozen=True)
class NearestImages:
    """For each of m images, the fakes, the nearest one of other images, the real ones."""

    distances: Float64[Tensor, "m 2"]  # to the nearest and to the next one, which is nan where there is none
    indices: Int64[Tensor, " m"]  # of the nearest one
    is_mirrored: Bool[Tensor, " m"]  # whether that is nearest as its mirror image

    @property
    def is_copy(self) -> Bool[Tensor, " m"]:
        """Whether each image is far nearer to one image than to the next one."""
        return self.distances[:, 0] < COPY_RATIO * self.distances[:, 1]


def thumbnails(x: Float[Tensor, "n c height width"]) -> Thumbs:
    """Images reduced to squares of at most THUMB_SIDE pixels a side, by means over their pixels."""
    return adaptive_avg_pool2d(x, min(THUMB_SIDE, *x.shape[2:]))


def nearest_images(
    real: Thumbs, fake: Float[Tensor, "m c h w"], *, left_out: Int64[Tensor, " m"] | None = None, mirror: bool = True
) -> NearestImages:
    """For each thumbnail `fake` the nearest of the thumbnails `real`, by Euclidean distance.

    - `left_out`: for each fake the index of a real image that does not count. Where the fakes are real images
      themselves, it is their own index.
    - `mirror`: compare with the mirror images of the real ones, too

    Each fake must have a real image that counts.
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
