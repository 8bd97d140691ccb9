"""Buckets: sizes of about one area, so that images of any aspect ratio lose little (NovelAI 2022; SDXL, App. I).

`Buckets` is the spec: which sizes there are. `BucketedStore` assigns the images of a store to them:

1. `find_buckets` reads the sizes of images from their headers, and returns the bucket of each (`BucketedRows`);
2. `albums` makes a source of each bucket's images;
3. `open` does both for all images, without buckets of which no image can be decoded, and makes a source whose batches
   are of one bucket each (`dumo.io.source.Bucketed`). `measure_crops` says what is cut off (`Crops`), and makes no
   source.

An image goes to the bucket of the nearest ratio (`nearest_size`). It is brought to the least size that covers the
bucket's, and the overhang is cut off, half on each side (`cropped_share`). In a bucket of ratio b, an image of ratio a
loses the share 1 - min(a / b, b / a), so the nearest ratio is the least loss.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Annotated

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from dumo.data.album import MAX_THREADS, UNREADABLE_FIX, Album, first_unreadable, unreadable_text
from dumo.data.pixel import MAX_ASPECT_RATIO, Crop, Size, ToRectangle, covering_size, upright_size
from dumo.data.store import Store, store_hashes
from dumo.io.read import first_few
from dumo.io.source import Bucketed
from dumo.runtime import signals
from dumo.runtime.limits import PIXELS
from dumo.runtime.progress import bar
from dumo.types import Spec, UserError

_UNREADABLE = -1  # in place of a bucket's index, for an image that cannot be read
_CHUNK_IMAGES = 256  # images whose sizes are read between two looks at signals: ours
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


@dataclass(frozen=True)
class BucketedRows:
    """A range of the images of a store, each with its bucket."""

    rows: range
    bucket_index: Int64[Tensor, " n"]  # the bucket of each, an index of `BucketedStore.sizes`, or _UNREADABLE
    cropped: Float[Tensor, " n"]  # the share of each that is cut off; 0 of an image that cannot be read


class BucketedStore:
    """The images of a store in their buckets: to be gone through by ranges of rows, or opened as a source."""

    def __init__(
        self, store: Store, side: int, crop: Crop, buckets: Buckets, *, flip: bool, skip: bool, class_per_image: bool
    ) -> None:
        """Read nothing yet.

        `flip`: mirror half of the images of a batch. `skip`: an image that cannot be read is in no bucket; False: it is
        refused. `class_per_image`: each image is a class of its own.
        """
        self.store = store
        self.flip = flip
        self.skip = skip
        self.class_per_image = class_per_image
        self.crop: Crop = crop
        self.groups = buckets.groups(side)
        self.sizes = buckets.sizes(side)
        self.hashes = store_hashes(store)
        self.names = store.labels.names if store.labels else ()
        self.unreadable: dict[int, str] = {}  # why an image cannot be read, by its number in the store

    def __len__(self) -> int:
        return len(self.store)

    def find_buckets(self, rows: range) -> BucketedRows:
        """Find the buckets of a range of images, by their headers. All headers are read again.

        Warns of images that cannot be read if they are skipped, else raises UserError for the first.
        """
        index_of_size = {size: k for k, size in enumerate(self.sizes)}
        bucket_index = torch.full((len(rows),), _UNREADABLE)
        cropped = torch.zeros(len(rows))
        for i, image_size in enumerate(self._image_sizes(rows)):
            if image_size is None:
                continue
            bucket_size = nearest_size(image_size, self.groups)
            bucket_index[i] = index_of_size[bucket_size]
            cropped[i] = cropped_share(image_size, bucket_size, self.crop)
        unreadable = [rows[i] for i in (bucket_index == _UNREADABLE).nonzero().flatten().tolist()]
        if unreadable:
            paths = first_few(unreadable, self.store.path)
            warnings.warn(
                f"{len(unreadable)} of {len(rows)} images cannot be read and are in no bucket: {paths}", stacklevel=2
            )
        return BucketedRows(rows, bucket_index, cropped)

    def albums(self, bucketed: BucketedRows, memory: float = 0.0) -> dict[int, Album]:
        """The images of a range by bucket, an index of `sizes`; kept decoded if all take at most `memory` bytes."""
        is_read = bucketed.bucket_index != _UNREADABLE
        readable_index = bucketed.bucket_index[is_read]
        decoded_bytes = sum(3 * prod(self.sizes[k]) for k in readable_index.tolist())
        album_memory = memory if decoded_bytes <= memory else 0.0  # all buckets are kept decoded, or none
        albums: dict[int, Album] = {}
        for k in readable_index.unique().tolist():
            height, width = self.sizes[k]
            albums[k] = Album(
                self.store,
                ToRectangle(height, width, self.crop),
                flip=self.flip,
                skip=self.skip,
                memory=album_memory,
                class_per_image=self.class_per_image,
                store_numbers=(bucketed.bucket_index == k).nonzero().flatten() + bucketed.rows.start,
                hashes=self.hashes,
            )
        return albums

    def measure_crops(self) -> Crops:
        """What the buckets leave of all images, whose headers are read for it. Raises UserError for a bad one."""
        return self._crops_of(self.find_buckets(range(len(self))))

    def open(self, memory: float) -> Bucketed:
        """All images, to train on; kept decoded if they take at most `memory` bytes.

        Raises UserError as `find_buckets`, and where none can be read.
        """
        bucketed = self.find_buckets(range(len(self)))
        if self.skip:
            bucketed = self._without_unreadable_buckets(bucketed)
        albums = self.albums(bucketed, memory)
        if not albums:
            raise UserError(f"none of the {len(self)} images can be read{first_unreadable(self.unreadable)}")
        return Bucketed(
            parts=[*albums.values()],
            shapes=[(3, *self.sizes[k]) for k in albums],
            about=str(self._crops_of(bucketed)),
        )

    def _without_unreadable_buckets(self, bucketed: BucketedRows) -> BucketedRows:
        """The buckets of a range, without those of which no image can be decoded, whatever their headers say.

        Warns of their images.
        """
        bucket_index = bucketed.bucket_index.clone()
        for k in bucket_index[bucket_index != _UNREADABLE].unique().tolist():
            images = [bucketed.rows[i] for i in (bucket_index == k).nonzero().flatten().tolist()]
            height, width = self.sizes[k]
            to_pixels = ToRectangle(height, width, self.crop)
            if any(self._is_decodable(i, to_pixels) for i in images):
                continue
            bucket_index[bucket_index == k] = _UNREADABLE
            warnings.warn(
                f"none of the {len(images)} images in the bucket {width} x {height} can be read, and it is left out; "
                f"the first: {self.unreadable[images[0]]}",
                stacklevel=3,
            )
        return replace(bucketed, bucket_index=bucket_index)

    def _is_decodable(self, i: int, to_pixels: ToRectangle) -> bool:
        """Whether image i can be read and decoded; why not is kept."""
        try:
            to_pixels(self.store.read(i))
        except (OSError, ValueError) as error:
            self.unreadable[i] = unreadable_text(self.store.path(i), error)
            return False
        return True

    def _crops_of(self, bucketed: BucketedRows) -> Crops:
        """What the buckets leave of the images of a range that can be read."""
        is_read = bucketed.bucket_index != _UNREADABLE
        return Crops.of(self.sizes, bucketed.bucket_index[is_read], bucketed.cropped[is_read])

    def _image_sizes(self, rows: range) -> Iterator[Size | None]:
        """The size of each image of a range, read on threads, with progress shown.

        None where an image cannot be read and is skipped; raises UserError where it is not skipped.
        """
        with (
            ThreadPoolExecutor(MAX_THREADS, "sizes") as threads,
            bar("reading the sizes of images", len(rows)) as tick,
        ):
            for first in range(rows.start, rows.stop, _CHUNK_IMAGES):
                signals.check()
                chunk = range(first, min(first + _CHUNK_IMAGES, rows.stop))
                yield from threads.map(self._read_size, chunk)
                tick(chunk.stop - rows.start, "")

    def _read_size(self, i: int) -> Size | None:
        """Read and hash image i. Returns its height and width, upright; None where it cannot be read and is skipped.

        Raises UserError where it cannot be read and is not skipped.
        """
        data: bytes | None = None
        size: Size | None = None
        try:
            data = self.store.read(i)
            size = upright_size(data)
        except (OSError, ValueError) as error:
            message = unreadable_text(self.store.path(i), error)
            if not self.skip:
                raise UserError(f"{message}: {UNREADABLE_FIX}") from error
            self.unreadable[i] = message
        if data is not None:
            self.hashes.check_item(i, data)
        return size
