"""Aspect-ratio buckets: image sizes of about the same area, which reduce cropping (NovelAI 2022; SDXL, App. I).

`Buckets` is the spec of the sizes. `dumo.data.images.BucketedImages` assigns images to buckets, and `Crops` summarizes
the cropping.

An image is assigned to the bucket with the nearest aspect ratio (`nearest_size`), resized to the smallest size that
covers the bucket's, and cropped in the middle (`cropped_share`). In a bucket with ratio b, an image with ratio a loses
the share 1 - min(a / b, b / a), so the nearest ratio minimizes the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Annotated

from pydantic import Field
from torch import Tensor

from dumo.data.pixel import MAX_ASPECT_RATIO, Crop, Size, covering_size
from dumo.runtime.limits import PIXELS
from dumo.types import Spec, UserError

SideLength = Annotated[int, Field(ge=1, le=PIXELS)]


class Buckets(Spec):
    """Sizes around an area of side x side pixels."""

    # Sides are multiples of this number of pixels (SDXL).
    step: SideLength = 64
    # The largest ratio of the longer side to the shorter.
    ratio: float = Field(default=2.0, ge=1, le=MAX_ASPECT_RATIO)
    # Sides of additional, smaller areas, for images that `side` would enlarge.
    smaller: tuple[SideLength, ...] = ()

    def groups(self, side: int) -> tuple[tuple[Size, ...], ...]:
        """Return the sizes of each area, from side x side to the smallest.

        Raises UserError if the side of an area is larger than `side` or not a multiple of the step, since the square
        would then not be a bucket.
        """
        area_sides = sorted({side, *self.smaller}, reverse=True)
        for area_side in area_sides:
            if area_side % self.step or area_side > side:
                raise UserError(
                    f"buckets of {area_side} x {area_side} pixels: make it a multiple of buckets.step = {self.step} "
                    f"and at most side = {side}"
                )
        return tuple(self._sizes_of_area(area_side) for area_side in area_sides)

    def sizes(self, side: int) -> tuple[Size, ...]:
        """Return the distinct sizes of all areas. Raises UserError if `step` does not divide a side."""
        return tuple(dict.fromkeys(size for group in self.groups(side) for size in group))

    def _sizes_of_area(self, area_side: int) -> tuple[Size, ...]:
        """Return the sorted sizes with the longest side within the area for each shorter side, in both orientations."""
        sizes: set[Size] = set()
        for short in range(self.step, area_side + 1, self.step):
            long = area_side * area_side // short // self.step * self.step
            if long <= self.ratio * short:
                sizes |= {(short, long), (long, short)}
        return tuple(sorted(sizes))


def cropped_share(image_size: Size, bucket_size: Size, crop: Crop = "adm") -> float:
    """Return the share of an image that is cropped for a bucket."""
    height, width = image_size
    bucket_height, bucket_width = bucket_size
    # Halve by boxes first, as in `dumo.data.pixel.crop_middle`.
    if crop == "adm":
        while height >= 2 * bucket_height and width >= 2 * bucket_width:
            height //= 2
            width //= 2
    return 1 - prod(bucket_size) / prod(covering_size((height, width), bucket_size))


def nearest_size(image_size: Size, groups: Sequence[Sequence[Size]]) -> Size:
    """Return the bucket of an image: the nearest aspect ratio in the largest area that does not enlarge the image.

    `groups` are the sizes of each area, the largest area first. If all would enlarge the image, the last is used.
    """
    nearest_by_area = [min(group, key=partial(_ratio_gap, image_size)) for group in groups]
    for size in nearest_by_area:
        if size[0] <= image_size[0] and size[1] <= image_size[1]:
            return size
    return nearest_by_area[-1]


def _ratio_gap(size: Size, other_size: Size) -> float:
    """Return the factor, at least 1, by which the aspect ratios of two sizes differ."""
    a = size[0] * other_size[1]
    b = size[1] * other_size[0]
    return max(a, b) / min(a, b)


@dataclass(frozen=True)
class Crops:
    """Numbers of images in buckets, and the cropped shares of images.

    num_buckets: the number of all buckets, including empty ones.
    counts: the number of images in each bucket that is not empty.
    """

    num_buckets: int
    counts: dict[Size, int]
    mean_cropped: float
    max_cropped: float

    @classmethod
    def of(cls, sizes: Sequence[Size], bucket_index: Tensor, cropped: Tensor) -> "Crops":
        """Summarize images with buckets (n,), as indices of `sizes`, and cropped shares (n,)."""
        num_images = bucket_index.bincount(minlength=len(sizes)).tolist()
        counts = {size: n for size, n in zip(sizes, num_images, strict=True) if n}
        if not len(cropped):
            return cls(len(sizes), counts, mean_cropped=0.0, max_cropped=0.0)
        return cls(len(sizes), counts, mean_cropped=cropped.double().mean().item(), max_cropped=cropped.max().item())

    def __str__(self) -> str:
        """Describe the counts and shares."""
        each = ", ".join(f"{width} x {height}: {n:,}" for (height, width), n in self.counts.items())
        share = f"cut off are {self.mean_cropped:.1%} of an image on average, {self.max_cropped:.1%} at most"
        return f"{len(self.counts)} of {self.num_buckets} buckets ({each}); {share}"
