"""Buckets: sizes of about one area, so that images of any aspect ratio lose little (NovelAI 2022; SDXL, App. I).

`Buckets` is the spec: which sizes there are. `dumo.data.images.BucketedImages` assigns images to them, and `Crops` says
what is cut off.

An image goes to the bucket of the nearest ratio (`nearest_size`). It is brought to the least size that covers the
bucket's, and the overhang is cut off, half on each side (`cropped_share`). In a bucket of ratio b, an image of ratio a
loses the share 1 - min(a / b, b / a), so the nearest ratio is the least loss.
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

    step: SideLength = 64  # pixels: sides are multiples of it (SDXL)
    ratio: float = Field(default=2.0, ge=1, le=MAX_ASPECT_RATIO)  # of the longer side to the shorter, at most
    smaller: tuple[SideLength, ...] = ()  # sides of further areas, for images that `side` would enlarge

    def groups(self, side: int) -> tuple[tuple[Size, ...], ...]:
        """The sizes of each area, side x side first, then the smaller ones from large to small.

        Raises UserError where the side of an area is no multiple of the step, for then the square would be no bucket,
        or is larger than `side`.
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
        """The sizes of all areas, each once. Raises UserError for a side that `step` does not divide."""
        return tuple(dict.fromkeys(size for group in self.groups(side) for size in group))

    def _sizes_of_area(self, area_side: int) -> tuple[Size, ...]:
        """For each shorter side the longest side that fits into the area, upright and lying; sorted, each size once."""
        sizes: set[Size] = set()
        for short in range(self.step, area_side + 1, self.step):
            long = area_side * area_side // short // self.step * self.step
            if long <= self.ratio * short:
                sizes |= {(short, long), (long, short)}
        return tuple(sorted(sizes))


def cropped_share(image_size: Size, bucket_size: Size, crop: Crop = "adm") -> float:
    """The share of an image that is cut off where it is brought to the size of a bucket."""
    height, width = image_size
    bucket_height, bucket_width = bucket_size
    if crop == "adm":  # halved by boxes first, as `dumo.data.pixel.crop_middle` does
        while height >= 2 * bucket_height and width >= 2 * bucket_width:
            height //= 2
            width //= 2
    return 1 - prod(bucket_size) / prod(covering_size((height, width), bucket_size))


def nearest_size(image_size: Size, groups: Sequence[Sequence[Size]]) -> Size:
    """The size that an image goes to: of the nearest aspect ratio, in the largest area that does not enlarge it.

    `groups` are the sizes of each area, the largest area first. Where each would enlarge the image, it is the last.
    """
    nearest_by_area = [min(group, key=partial(_ratio_gap, image_size)) for group in groups]
    for size in nearest_by_area:
        if size[0] <= image_size[0] and size[1] <= image_size[1]:
            return size
    return nearest_by_area[-1]


def _ratio_gap(size: Size, other_size: Size) -> float:
    """The factor, at least 1, by which the aspect ratios of two sizes differ."""
    a = size[0] * other_size[1]
    b = size[1] * other_size[0]
    return max(a, b) / min(a, b)


@dataclass(frozen=True)
class Crops:
    """What buckets leave of images."""

    num_buckets: int  # with images or without
    counts: dict[Size, int]  # the number of images in each bucket that has some
    mean_cropped: float  # share of an image that is cut off, in the mean
    max_cropped: float  # largest such share

    @classmethod
    def of(cls, sizes: Sequence[Size], bucket_index: Tensor, cropped: Tensor) -> "Crops":
        """Count images, given the bucket (n,) of each, as an index of `sizes`, and the share (n,) that is cut off."""
        num_images = bucket_index.bincount(minlength=len(sizes)).tolist()
        counts = {size: n for size, n in zip(sizes, num_images, strict=True) if n}
        if not len(cropped):
            return cls(len(sizes), counts, mean_cropped=0.0, max_cropped=0.0)
        return cls(len(sizes), counts, mean_cropped=cropped.double().mean().item(), max_cropped=cropped.max().item())

    def __str__(self) -> str:
        """The counts and shares in words."""
        each = ", ".join(f"{width} x {height}: {n:,}" for (height, width), n in self.counts.items())
        share = f"cut off are {self.mean_cropped:.1%} of an image on average, {self.max_cropped:.1%} at most"
        return f"{len(self.counts)} of {self.num_buckets} buckets ({each}); {share}"
