"""Compute the distances of samples to the nearest training images for a report.

`measure_proximity` compares images in the same way as the score `copies` (`dumo.evaluation.copy`). The unit of its
distances is the mean distance between an image of the data and its nearest other image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dumo.config.conditions import shown_data
from dumo.data import Data, Images
from dumo.evaluation.copy import nearest_images, thumbnails
from dumo.evaluation.neighbours import Real
from dumo.runtime.random import stream
from dumo.types import Sample

# The number of images of the data from which the unit is estimated.
MAX_REAL = 200


@dataclass(frozen=True)
class Proximity:
    """The nearest image of the data for each of n samples."""

    # (n, *pixels). An image is mirrored if its mirror image is nearer.
    nearest: Sample
    # Distances in units of the mean distance within the data. nan if there is only one image.
    ratios: Sequence[float]
    is_copy: Sequence[bool]
    # The number of images of the data that were compared.
    num_real: int

    @property
    def mean_ratio(self) -> float:
        """Return the mean ratio."""
        return sum(self.ratios) / len(self.ratios)

    @property
    def num_copies(self) -> int:
        """Return the number of samples that are copies."""
        return sum(self.is_copy)


def measure_proximity(data: Data, x: Sample, real: Real, seed: int) -> Proximity:
    """Compare samples x (n, *pixels) with the images `real` of the data, all in [-1, 1].

    The seed selects the images from which the unit is estimated. Photos are also compared with their mirror images.
    """
    real_thumbs = thumbnails(real)
    mirror = isinstance(shown_data(data), Images)
    nearest = nearest_images(real_thumbs, thumbnails(x), mirror=mirror)
    unit = torch.nan
    if len(real) > 1:
        rows = torch.randperm(len(real), generator=stream(seed, "spacing of the data"))[:MAX_REAL]
        nearest_others = nearest_images(real_thumbs, real_thumbs[rows], left_out=rows, mirror=mirror)
        # The mean distance is 0 if all images are duplicated.
        unit = nearest_others.distances[:, 0].mean().item() or torch.nan
    images = real[nearest.indices]
    is_mirrored = nearest.is_mirrored[:, None, None, None]
    return Proximity(
        nearest=torch.where(is_mirrored, images.flip(-1), images),
        ratios=(nearest.distances[:, 0] / unit).tolist(),
        is_copy=nearest.is_copy.tolist(),
        num_real=len(real),
    )
