"""Buckets: sizes of about one area, so that images of any aspect ratio lose little (NovelAI 2022; SDXL, App. I).

`Buckets` is the spec: which sizes there are. `Assorted` has the images of a store in their buckets:

1. `find_buckets` reads the sizes of images from their headers, and finds the bucket of each (`nearest`);
2. `albums` then has the images by bucket, and `crops` says what was cut off;
3. `open` does both for all images, and makes a source whose batches are of one bucket each (`dumo.io.source.Bucketed`).

An image goes to the bucket of the nearest ratio. It is brought to the least size that covers the bucket's, and the
overhang is cut off, half on each side. In a bucket of ratio b, an image of ratio a loses the share
1 - min(a / b, b / a), so the nearest ratio is the least loss.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dumo.data.album import HOW_TO_MEND, MAX_THREADS, Album, fault
from dumo.data.pixel import MAX_ASPECT_RATIO, Crop, Size, ToRectangle, covering_size, upright_size
from dumo.data.store import Store, store_hashes
from dumo.io.read import first_few
from dumo.io.source import Bucketed
from dumo.runtime import signals
from dumo.runtime.limits import PIXELS
from dumo.runtime.progress import late
from dumo.types import Spec, UserError

UNREAD = -1  # in place of a bucket: the image's size was not read yet, or cannot be
CHUNK_IMAGES = 256  # images whose sizes are read between two looks at signals: ours
Pixels = Annotated[int, Field(ge=1, le=PIXELS)]


class Buckets(Spec):
    """Sizes around an area of side x side pixels."""

    step: Pixels = 64  # pixels: sides are multiples of it (SDXL)
    ratio: float = Field(default=2.0, ge=1, le=MAX_ASPECT_RATIO)  # of the longer side to the shorter, at most
    smaller: tuple[Pixels, ...] = ()  # sides of further areas, for images that `side` would enlarge

    def groups(self, side: int) -> tuple[tuple[Size, ...], ...]:
        """The sizes of each area, the largest area first: for each shorter side the longest that fits into the area.

        Raises UserError where a side is no multiple of the step, for the square would be no bucket.
        """
        areas = sorted({side, *self.smaller}, reverse=True)
        for area in areas:
            if area % self.step or area > side:
                raise UserError(
                    f"buckets of {area} x {area} pixels: make it a multiple of buckets.step = {self.step} and at most "
                    f"side = {side}"
                )
        return tuple(tuple(sorted(set(self._around(area)))) for area in areas)

    def sizes(self, side: int) -> tuple[Size, ...]:
        """The sizes of all areas, each once. Raises as `groups`."""
        return tuple(dict.fromkeys(size for group in self.groups(side) for size in group))

    def _around(self, side: int) -> Iterator[Size]:
        """The sizes of an area: each shorter side with the longest side that fits, upright and lying."""
        for short in range(self.step, side + 1, self.step):
            long = side * side // short // self.step * self.step
            if long <= self.ratio * short:
                yield from ((short, long), (long, short))


def lost(image: Size, size: Size, crop: Crop = "adm") -> float:
    """The share of an image that is cut off where it is brought to `size`."""
    while crop == "adm" and all(side >= 2 * wanted for side, wanted in zip(image, size, strict=True)):
        image = image[0] // 2, image[1] // 2  # as `dumo.data.pixel` does
    return 1 - prod(size) / prod(covering_size(image, size))


def nearest(image: Size, groups: Sequence[Sequence[Size]]) -> Size:
    """The size that an image goes to: of the nearest ratio, in the largest area that does not enlarge the image."""
    nearest_of_areas = [min(group, key=lambda size: _ratio_gap(image, size)) for group in groups]
    for size in nearest_of_areas:
        if size[0] <= image[0] and size[1] <= image[1]:
            return size
    return nearest_of_areas[-1]


def _ratio_gap(image: Size, size: Size) -> float:
    """The factor, at least 1, by which two aspect ratios differ."""
    a = image[0] * size[1]
    b = image[1] * size[0]
    return max(a, b) / min(a, b)


@dataclass(frozen=True)
class Crops:
    """What buckets leave of images."""

    buckets: int  # the number of buckets, with images or without
    counts: dict[Size, int]  # the number of images in each bucket that has some
    mean: float  # share of an image that is cut off
    most: float  # largest such share

    @classmethod
    def of(cls, sizes: Sequence[Size], buckets: Tensor, cropped: Tensor) -> "Crops":
        """Count images, given the bucket (n,) of each, as an index of `sizes`, and the share (n,) that is cut off."""
        num_images = buckets.bincount(minlength=len(sizes)).tolist()
        counts = {size: n for size, n in zip(sizes, num_images, strict=True) if n}
        if not len(cropped):
            return cls(len(sizes), counts, mean=0.0, most=0.0)
        return cls(len(sizes), counts, mean=cropped.double().mean().item(), most=cropped.max().item())

    def __str__(self) -> str:
        """The counts and shares in words."""
        each = ", ".join(f"{width} x {height}: {n:,}" for (height, width), n in self.counts.items())
        share = f"cut off are {self.mean:.1%} of an image on average, {self.most:.1%} at most"
        return f"{len(self.counts)} of {self.buckets} buckets ({each}); {share}"


class Assorted:
    """The images of a store in their buckets: to be gone through by ranges of rows, or opened as a source."""

    def __init__(
        self, store: Store, side: int, crop: Crop, buckets: Buckets, *, flip: bool, skip: bool, numbered: bool
    ) -> None:
        """Read nothing yet.

        `flip`: mirror half of the images of a batch. `skip`: an image that cannot be read is in no bucket; False: it is
        refused. `numbered`: each image is a class of its own.
        """
        self.store = store
        self.flip = flip
        self.skip = skip
        self.numbered = numbered
        self.crop: Crop = crop
        self.groups = buckets.groups(side)
        self.sizes = buckets.sizes(side)
        self.hashes = store_hashes(store)
        self.names = store.labels.names if store.labels else ()
        self.buckets = torch.full((len(store),), UNREAD)  # the bucket of each image, an index of `sizes`
        self.cropped = torch.zeros(len(store))  # the share of each image that is cut off

    def __len__(self) -> int:
        return len(self.store)

    def find_buckets(self, rows: range) -> None:
        """Find the buckets of a range of images, by their headers.

        Warns of images that cannot be read if they are skipped, else raises UserError for the first.
        """
        bucket_of_size = {size: k for k, size in enumerate(self.sizes)}
        with ThreadPoolExecutor(MAX_THREADS, "sizes") as pool, late("reading the sizes of images", len(rows)) as tick:
            for first in range(rows.start, rows.stop, CHUNK_IMAGES):
                signals.check()
                chunk = range(first, min(first + CHUNK_IMAGES, rows.stop))
                for i, size in zip(chunk, pool.map(self._size, chunk), strict=True):
                    if size is not None:
                        bucket_size = nearest(size, self.groups)
                        self.buckets[i] = bucket_of_size[bucket_size]
                        self.cropped[i] = lost(size, bucket_size, self.crop)
                tick(chunk.stop - rows.start, "")
        bad = [i for i in rows if self.buckets[i] == UNREAD]
        if bad:
            paths = first_few(bad, self.store.path)
            warnings.warn(
                f"{len(bad)} of {len(rows)} images cannot be read and are in no bucket: {paths}", stacklevel=2
            )

    def albums(self, rows: range, memory: float = 0.0) -> dict[int, Album]:
        """A range of images by bucket, after `find_buckets`; kept decoded if all take at most `memory` bytes."""
        buckets = self.buckets[rows.start : rows.stop]
        decoded_bytes = sum(3 * prod(self.sizes[k]) for k in buckets.tolist() if k != UNREAD)
        albums: dict[int, Album] = {}
        for k in buckets.unique().tolist():
            if k == UNREAD:
                continue
            height, width = self.sizes[k]
            albums[k] = Album(
                self.store,
                ToRectangle(height, width, self.crop),
                flip=self.flip,
                skip=self.skip,
                memory=memory if decoded_bytes <= memory else 0.0,
                numbered=self.numbered,
                only=(buckets == k).nonzero().flatten() + rows.start,
                hashes=self.hashes,
            )
        return albums

    def crops(self) -> Crops:
        """What the buckets leave of all images. Raises as `find_buckets`."""
        self.find_buckets(range(len(self)))
        is_read = self.buckets != UNREAD
        return Crops.of(self.sizes, self.buckets[is_read], self.cropped[is_read])

    def open(self, memory: float) -> Bucketed:
        """All images, to train on. Raises UserError as `find_buckets`, and where none can be read."""
        crops = self.crops()
        parts = self.albums(range(len(self)), memory)
        if not parts:
            raise UserError(f"none of the {len(self)} images can be read; the first: {self.store.path(0)}")
        return Bucketed([*parts.values()], [(3, *self.sizes[k]) for k in parts], str(crops))

    def _size(self, i: int) -> Size | None:
        """The height and width of image i, which is hashed; None where it cannot be read and is skipped."""
        try:
            data = self.store.read(i)
            size = upright_size(data)
        except (OSError, ValueError) as error:
            if self.skip:
                return None
            raise UserError(f"{self.store.path(i)} {fault(error)}: {HOW_TO_MEND}") from error
        self.hashes.see(i, data)
        return size
