"""How near samples lie to the images of the data, as a report shows it: a copy is seen as a copy.

`measure_proximity` is the entrance. Images are compared as the score `copies` compares them (`dumo.evaluation.copy`).
Its distances mean nothing by themselves, so they are given in units of the mean distance of an image of the data to the
nearest other one.
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

# Images of the data whose distance to the others is the unit.
MAX_REAL = 200


@dataclass(frozen=True)
class Proximity:
    """The nearest image of the data of each of n samples."""

    nearest: Sample  # (n, *pixels), the nearest images, mirrored where they are nearer so
    ratios: Sequence[float]  # distances to them in units of `unit`; nan where there is one image alone
    is_copy: Sequence[bool]
    num_real: int  # images that were looked at

    @property
    def mean_ratio(self) -> float:
        """The mean of all ratios."""
        return sum(self.ratios) / len(self.ratios)

    @property
    def num_copies(self) -> int:
        """The number of samples that are copies."""
        return sum(self.is_copy)


def measure_proximity(data: Data, x: Sample, real: Real, seed: int) -> Proximity:
    """Compare samples x (n, *pixels) with the images `real` of the data, all in [-1, 1].

    The images whose distances are the unit are chosen by a key of the seed. Photos are compared with their mirror
    images, too.
    """
    real_thumbs = thumbnails(real)
    mirror = isinstance(shown_data(data), Images)
    nearest = nearest_images(real_thumbs, thumbnails(x), mirror=mirror)
    unit = torch.nan
    if len(real) > 1:
        rows = torch.randperm(len(real), generator=stream(seed, "spacing of the data"))[:MAX_REAL]
        nearest_others = nearest_images(real_thumbs, real_thumbs[rows], left_out=rows, mirror=mirror)
        unit = nearest_others.distances[:, 0].mean().item() or torch.nan  # 0 where each image is there twice
    images = real[nearest.indices]
    is_mirrored = nearest.is_mirrored[:, None, None, None]
    return Proximity(
        nearest=torch.where(is_mirrored, images.flip(-1), images),
        ratios=(nearest.distances[:, 0] / unit).tolist(),
        is_copy=nearest.is_copy.tolist(),
        num_real=len(real),
    )
