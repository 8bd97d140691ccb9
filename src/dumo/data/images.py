"""The user's images as training data.

- `Images` is the spec, `data` of a run with `kind: images`. When a run is opened, `Images.with_facts` counts classes or
  captions that are not given in the spec, and `Images.open` makes a source.
- `Source` decodes images: `batch` for a training step, `reference` for evaluation, `rows` to read all once. Every image
  is compared with its earlier content (`dumo.data.ledger`).
- `BucketedImages` assigns images to buckets of several sizes.

`dumo.data.rows` opens the files, and `dumo.data.pixel` decodes them.
"""

import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from pydantic import Field, field_validator, model_serializer, model_validator
from torch import Tensor

from dumo.data.augment import Edm
from dumo.data.bucket import Buckets, Crops, cropped_share, nearest_size
from dumo.data.caption import (
    Captioned,
    CaptionFiles,
    Captioning,
    Templates,
    cached_captions,
    captions_of,
    edited_images,
    image_hash,
    with_captions,
)
from dumo.data.ledger import Ledger
from dumo.data.pixel import Crop, Size, ToRectangle, ToSquare, Unreadable, upright_size
from dumo.data.rows import DatasetRows, FolderRows, NoImagesError, ParquetRows, Rows, TarRows, open_rows, warn_once
from dumo.encoders.caption_ids import Captions
from dumo.io import hub
from dumo.io.data_source import Bucketed, mirrored_rows, rows_of
from dumo.io.picture import from_uint8
from dumo.io.read import first_few, user_path
from dumo.io.suffix import UNREADABLE_SUFFIXES
from dumo.runtime import signals
from dumo.runtime.limits import CLASSES, GIGABYTE, GIGABYTES, PIXELS, ROWS
from dumo.runtime.progress import bar
from dumo.runtime.random import stream
from dumo.runtime.threads import cores
from dumo.types import FREE, HUB_DATASET, PLACE, Spec, UserError

# Images are decoded by at most this many threads.
MAX_THREADS = min(16, cores())
UNREADABLE_FIX = "repair or remove it, or skip such images with data.on_bad=skip"
# Values that disable fields which change images.
_OFF_VALUES = {"flip": "false", "buckets": "null", "augment": "null"}
_MAX_CLASSES = 10**6
# The largest number of classes listed in a message.
_MAX_NAMED = 8
# The number of images between two checks for signals.
_WINDOW = 1024

Pixels = UInt8[Tensor, "n c h w"]
# Numbers of rows, images or classes.
Numbers = Int64[Tensor, " n"]


@dataclass(frozen=True)
class Labels:
    """The classes of images.

    c: (n,), Long, in 0 ... count - 1.
    count: the number of names or, if classes have no names, the largest class number plus one.
    """

    c: Tensor
    count: int
    names: tuple[str, ...] = ()


def labels_of(rows: Rows, label: str = "label") -> Labels | None:
    """Read classes from folders, .cls members, or the column `label`; None if there are none.

    Raises UserError if only some images have a class, or if a class is not a number from 0.
    """
    if isinstance(rows, FolderRows):
        folders = rows.class_folders
        names = sorted(set(folders))
        if names == [""]:
            return None
        if names[0] == "":
            raise UserError(
                f"{rows.root} has images both in folders ({first_few(names[1:], max_items=_MAX_NAMED)}) and outside "
                "of them, which have no class: set data.labelled=false, or move them"
            )
        return _named_labels(folders)
    column = "cls" if isinstance(rows, TarRows) else label
    if column not in rows.columns():
        return None
    values = rows.column(column)
    where = f"column '{column}' of {rows.root}"
    if all(value is None for value in values):
        return None
    if None in values:
        raise UserError(
            f"{rows.path(values.index(None))} has no class in '{column}', but other images have: set "
            "data.labelled=false"
        )
    if all(isinstance(value, str) for value in values) and not isinstance(rows, TarRows):
        return _named_labels(values)
    wrong = next((i for i, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, int)), None)
    if wrong is not None:
        raise UserError(
            f"{rows.path(wrong)}: '{column}' is {values[wrong]!r}, which is not a class number: set data.label, or "
            "data.labelled=false"
        )
    return number_labels(values, where, rows.class_names.get(column, ()))


def number_labels(values: Sequence[int], where: str, names: Sequence[str] = ()) -> Labels:
    """Make labels from class numbers. `names` are the names of the classes, if known.

    Warns about classes without images, as with numbers from 1, or ids. Raises UserError if a number is not a class, or
    if there are more than _MAX_CLASSES.
    """
    low = min(values)
    high = max(values)
    fix = "name the column of classes with data.label, number them from 0, or set data.labelled=false"
    if low < 0 or (names and high >= len(names)):
        raise UserError(f"{where} has the class {low if low < 0 else high}, which does not exist: {fix}")
    if high >= _MAX_CLASSES:
        raise UserError(f"{where} has the class {high}, but at most {_MAX_CLASSES:,} classes are supported: {fix}")
    num_empty = high + 1 - len(set(values))
    if not names and num_empty:
        warn_once(
            f"{where} has classes from {low:,} to {high:,}, so there are {high + 1:,}, and {num_empty:,} of them have "
            "no image: number them from 0 without gaps"
        )
    return Labels(torch.tensor(values, dtype=torch.long), len(names) or high + 1, tuple(names))


def _named_labels(values: Sequence[str]) -> Labels:
    """Make labels from class names, numbered in alphabetical order.

    Raises UserError for two names of the same text, as macOS and Linux write "é" differently.
    """
    names = sorted(set(values))
    name_by_text: dict[str, str] = {}
    for name in names:
        same = name_by_text.setdefault(unicodedata.normalize("NFC", name), name)
        if same != name:
            raise UserError(
                f"classes {same!a} and {name!a} are the same text, {name}, in two Unicode forms: give them one name"
            )
    number_of = {name: number for number, name in enumerate(names)}
    return Labels(torch.tensor([number_of[value] for value in values]), len(names), tuple(names))


class NoneReadableError(UserError):
    """No image can be read."""


class Source:
    """Decoded images in [-1, 1] with their classes. `size` and `len` include unreadable images.

    An unreadable image raises UserError with its name. With `skip`, a warning is issued instead, and the image is
    replaced by the next readable one in a batch, or left out in `rows`.
    """

    def __init__(
        self,
        encoded: Rows,
        to_pixels: ToRectangle,
        labels: Labels | None = None,
        *,
        flip: bool = False,
        augment: Edm | None = None,
        skip: bool = False,
        class_per_image: bool = False,
        chosen: Numbers | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Store the settings without reading images.

        to_pixels: decodes and resizes an image.
        labels: the classes of all images of `encoded`. None means class 0.
        flip: mirror half of the images of a batch.
        class_per_image: use the number of each image as its class.
        chosen: the numbers of the images in this source. None means all.
        """
        self.encoded = encoded
        self.to_pixels = to_pixels
        self.labels = labels
        self.flip = flip
        self.augment = augment
        self.skip = skip
        self.class_per_image = class_per_image
        self.chosen = chosen
        self.ledger = ledger or Ledger(encoded, labels.c if labels else None)
        # The pixels of all rows if they are kept, and which of them are decoded.
        self.decoded: Pixels | None = None
        self.is_decoded = torch.zeros(0, dtype=torch.bool)
        # Error messages by the number of the unreadable image.
        self.unreadable: dict[int, str] = {}
        self._num_warned = 0
        self._lock = Lock()
        # Limits the threads of all concurrent batches.
        self._slots = Semaphore(MAX_THREADS)

    def subset(self, chosen: Numbers, size: Size | None = None) -> "Source":
        """Return a source of the images with these numbers, resized to `size` if given."""
        to_pixels = ToRectangle(*size, self.to_pixels.crop) if size else self.to_pixels
        return Source(
            self.encoded,
            to_pixels,
            self.labels,
            flip=self.flip,
            augment=self.augment,
            skip=self.skip,
            class_per_image=self.class_per_image,
            chosen=chosen,
            ledger=self.ledger,
        )

    def keep_decoded(self, memory: float, *, now: bool = True) -> "Source":
        """Keep decoded pixels if all images take at most `memory` bytes; return this source.

        With `now`, all images are decoded immediately. Raises UserError if an image is unreadable and such images are
        not skipped, or if none is readable.
        """
        if len(self) * prod(self.to_pixels.shape) > memory:
            return self
        self.decoded = torch.zeros(len(self), *self.to_pixels.shape, dtype=torch.uint8)
        self.is_decoded = torch.zeros(len(self), dtype=torch.bool)
        if not now:
            return self
        with bar("decoding images", len(self)) as tick:
            for rows in torch.arange(len(self)).split(_WINDOW):
                signals.check()
                self._pixels(rows, self.image_numbers(rows))
                tick(int(rows[-1]) + 1, "")
        self._require_any_readable()
        self.warn_of_unreadable("left out, or in a batch replaced by the next")
        return self

    def __len__(self) -> int:
        return len(self.encoded) if self.chosen is None else len(self.chosen)

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or ()."""
        return self.labels.names if self.labels else ()

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return rows of a step's batch: images (b, 3, h, w) with classes (b,), or with augment labels (b, n).

        Each epoch has its own order, and half of the images are mirrored if `flip`. The batch only depends on the
        arguments.
        """
        pixels, c = self._read_with_replacements(rows_of(step, batch_size, size=len(self), seed=seed, rows=rows))
        self.warn_of_unreadable("left out, or in a batch replaced by the next", min_growth=2)
        if self.flip:
            is_mirrored = mirrored_rows(step, batch_size, seed, rows)[:, None, None, None]
            pixels = torch.where(is_mirrored, pixels.flip(-1), pixels)
        x = from_uint8(pixels)
        if not self.augment:
            return x, c
        augmentation = self.augment.draw(batch_size, stream(seed, step, "augment"))[rows]
        return self.augment(x, augmentation), augmentation.augment_labels

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Numbers:
        """Return the numbers of the images of a step's batch, (b,), including unreadable ones."""
        return self.image_numbers(rows_of(step, batch_size, size=len(self), seed=seed, rows=rows))

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Return all images if they are kept decoded, else the i-th choice of n, with classes, not mirrored."""
        if self.decoded is not None or n >= len(self):
            return self.rows(slice(None))
        return self.at(torch.randperm(len(self), generator=stream(seed, "reference", i))[:n])

    def rows(self, rows: slice | Numbers) -> tuple[Tensor, Tensor]:
        """Return a slice of rows or given rows with their classes, not mirrored, without unreadable images."""
        return self.at(torch.arange(len(self))[rows])

    def at(self, rows: Numbers) -> tuple[Tensor, Tensor]:
        """Return the images at these rows with their classes, not mirrored, without unreadable images."""
        numbers = self.image_numbers(rows)
        pixels, is_read = self._pixels(rows, numbers)
        self.warn_of_unreadable("left out", min_growth=2)
        if not is_read.all():
            pixels = pixels[is_read]
        return from_uint8(pixels), self._classes(numbers[is_read])

    def image_numbers(self, rows: Numbers) -> Numbers:
        """Return the numbers in `encoded` of these rows, (n,)."""
        return rows if self.chosen is None else self.chosen[rows]

    def readable_numbers(self, rows: range) -> list[int]:
        """Return the numbers of the images that `Source.rows` returned for a range of rows."""
        return [i for i in self.image_numbers(torch.tensor(rows)).tolist() if i not in self.unreadable]

    def readable_labels(self) -> Numbers | None:
        """Return the classes of readable images; None if all are readable, if unknown, or with `class_per_image`."""
        if self.decoded is None or not self.unreadable or self.class_per_image:
            return None
        return self._classes(torch.tensor(self.readable_numbers(range(len(self)))))

    def sizes(self, rows: range) -> Iterator[Size | None]:
        """Yield the upright height and width of each image in a range of rows; None if it is unreadable and skipped.

        Whole files are read, but images are only decoded if their header has no size.
        """
        numbers = self.image_numbers(torch.tensor(rows)).tolist()
        with ThreadPoolExecutor(MAX_THREADS, "sizes") as pool, bar("reading the sizes of images", len(rows)) as tick:
            for first in range(0, len(numbers), _WINDOW):
                signals.check()
                window = numbers[first : first + _WINDOW]
                yield from pool.map(lambda i: self._read(i, upright_size), window)
                tick(first + len(window), "")

    def fingerprint(self) -> str:
        """Return a digest that changes if images are added, removed or renamed, or change their size or class."""
        chosen = "" if self.chosen is None else f"first {len(self.chosen)}"
        return self.ledger.fingerprint(*self.names, chosen)

    def warn_of_unreadable(self, treatment: str, *, min_growth: int = 1) -> None:
        """Warn about new unreadable images in one line. `treatment` describes what is done with them.

        To limit the number of warnings, there is none until their number grows by the factor `min_growth`.
        """
        with self._lock:
            num_bad = len(self.unreadable)
            if num_bad < max(1, min_growth * self._num_warned) or num_bad == self._num_warned:
                return
            new = sorted(list(self.unreadable)[self._num_warned : num_bad])
            self._num_warned = num_bad
        examples = first_few(self.unreadable[i] for i in new)
        warnings.warn(f"{num_bad} of {len(self)} images cannot be read and are {treatment}: {examples}", stacklevel=3)

    def _classes(self, numbers: Numbers) -> Numbers:
        """Return the classes of the images with these numbers."""
        if self.class_per_image:
            return numbers
        return self.labels.c[numbers] if self.labels else torch.zeros(len(numbers), dtype=torch.long)

    def _read_with_replacements(self, rows: Numbers) -> tuple[Pixels, Numbers]:
        """Return the pixels and classes of rows. An unreadable image is replaced by the next readable one."""
        rows = rows.clone()
        pixels, is_read = self._pixels(rows, self.image_numbers(rows))
        while not is_read.all():
            self._require_any_readable()
            bad = ~is_read
            rows[bad] = (rows[bad] + 1) % len(self)
            next_pixels, next_is_read = self._pixels(rows[bad], self.image_numbers(rows[bad]))
            pixels[bad] = next_pixels
            is_read[bad] = next_is_read
        return pixels, self._classes(self.image_numbers(rows))

    def _pixels(self, rows: Numbers, numbers: Numbers) -> tuple[Pixels, Bool[Tensor, " n"]]:
        """Return the pixels of images, given by row and by number, and which of them are readable."""
        if self.decoded is None:
            return self._decode(numbers)
        missing = rows[~self.is_decoded[rows]]
        if len(missing):
            self.decoded[missing], _ = self._decode(self.image_numbers(missing))
            self.is_decoded[missing] = True
        is_read = torch.ones(len(numbers), dtype=torch.bool)
        if self.unreadable:
            is_read = torch.tensor([i not in self.unreadable for i in numbers.tolist()])
        return self.decoded[rows], is_read

    def _decode(self, numbers: Numbers) -> tuple[Pixels, Bool[Tensor, " n"]]:
        """Read and decode images on threads; return their pixels, and which of them are readable."""
        pixels = torch.zeros(len(numbers), *self.to_pixels.shape, dtype=torch.uint8)
        is_read = torch.ones(len(numbers), dtype=torch.bool)

        def decode(k: int) -> None:
            with self._slots:
                image = self._read(int(numbers[k]), self.to_pixels)
            if image is None:
                is_read[k] = False
            else:
                pixels[k] = image

        # Create the pool for each batch, which takes a millisecond, so that forked processes do not inherit one.
        pool = ThreadPoolExecutor(min(MAX_THREADS, max(1, len(numbers))), "decode")
        try:
            for window in torch.arange(len(numbers)).split(_WINDOW):
                list(pool.map(decode, window.tolist()))
        finally:
            pool.shutdown(cancel_futures=True)
        return pixels, is_read

    def _read(self, i: int, function: Callable[[bytes], Any]) -> Any:  # noqa: ANN401, what the function returns
        """Read image i, compare it with its earlier content, and apply a function to its bytes.

        Returns None if it is unreadable and skipped. Raises UserError if it is not skipped, or has changed.
        """
        if i in self.unreadable:
            return None
        try:
            data = self.encoded.read(i)
        except (OSError, ValueError) as error:
            return self._record_unreadable(i, error)
        self.ledger.check(i, data)
        try:
            return function(data)
        except ValueError as error:
            return self._record_unreadable(i, error)

    def _record_unreadable(self, i: int, error: Exception) -> None:
        """Record the error message of image i. Raises UserError unless such images are skipped."""
        text = unreadable_text(self.encoded.path(i), error)
        if not self.skip:
            raise UserError(f"{text}: {UNREADABLE_FIX}") from error
        self.unreadable[i] = text

    def require_a_readable(self) -> None:
        """Decode images until one is readable. Raises NoneReadableError if none is."""
        if self.decoded is None:
            for i in self.image_numbers(torch.arange(len(self))).tolist():
                if self._read(i, self.to_pixels) is not None:
                    return
        self._require_any_readable()

    def _require_any_readable(self) -> None:
        """Raise NoneReadableError if all images are known to be unreadable."""
        if len(self.unreadable) >= len(self):
            raise NoneReadableError(f"none of the {len(self)} images can be read{first_unreadable(self.unreadable)}")


def unreadable_text(path: str, error: Exception) -> str:
    """Return a message with the path and the reason, and a hint for image formats of phones."""
    reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if isinstance(error, Unreadable):
        reason = str(error)
    if os.path.splitext(path)[1].lower() in UNREADABLE_SUFFIXES:
        reason += "; convert it to JPEG or PNG"
    return f"{path} {reason}"


def first_unreadable(unreadable: dict[int, str]) -> str:
    """Return the end of a message that no image is readable, with the first error; "" if it is unknown."""
    return f"; the first: {unreadable[min(unreadable)]}" if unreadable else ""


@dataclass(frozen=True)
class RowsInBuckets:
    """The buckets of a range of images.

    bucket_index: indices of `BucketedImages.sizes`; -1 if an image is unreadable.
    cropped: the share of each image that is cropped; 0 if it is unreadable.
    """

    rows: range
    bucket_index: Int64[Tensor, " n"]
    cropped: Float[Tensor, " n"]


class BucketedImages:
    """Images in buckets of several sizes, to read in ranges of rows, or to open as a source."""

    def __init__(self, source: Source, buckets: Buckets, side: int) -> None:
        """Store the settings without reading images. `source` has all images; its size is ignored."""
        self.source = source
        self.groups = buckets.groups(side)
        self.sizes = buckets.sizes(side)
        self.ledger = source.ledger
        self.names = source.names

    def __len__(self) -> int:
        return len(self.source)

    @property
    def unreadable(self) -> dict[int, str]:
        """Error messages by the number of the unreadable image."""
        return self.source.unreadable

    def find(self, rows: range) -> RowsInBuckets:
        """Find the buckets of a range of images from their headers."""
        index_of_size = {size: k for k, size in enumerate(self.sizes)}
        bucket_index = torch.full((len(rows),), -1)
        cropped = torch.zeros(len(rows))
        for k, image_size in enumerate(self.source.sizes(rows)):
            if image_size is not None:
                bucket_size = nearest_size(image_size, self.groups)
                bucket_index[k] = index_of_size[bucket_size]
                cropped[k] = cropped_share(image_size, bucket_size, self.source.to_pixels.crop)
        self.source.warn_of_unreadable("in no bucket")
        return RowsInBuckets(rows, bucket_index, cropped)

    def sources_by_size(self, found: RowsInBuckets) -> dict[Size, Source]:
        """Return a source for each size with images in a range."""
        sources: dict[Size, Source] = {}
        for k, size in enumerate(self.sizes):
            positions = (found.bucket_index == k).nonzero().flatten()
            if len(positions):
                sources[size] = self.source.subset(self.source.image_numbers(positions + found.rows.start), size)
        return sources

    def crops(self, found: RowsInBuckets) -> Crops:
        """Summarize the cropping of the readable images of a range."""
        is_read = found.bucket_index >= 0
        return Crops.of(self.sizes, found.bucket_index[is_read], found.cropped[is_read])

    def open(self, memory: float) -> Bucketed:
        """Return all images as a source for training, kept decoded if they take at most `memory` bytes.

        If unreadable images are skipped, a bucket without readable images is left out. Raises UserError if none
        remains.
        """
        found = self.find(range(len(self)))
        sources = self.sources_by_size(found)
        keeps = sum(3 * prod(size) * len(source) for size, source in sources.items()) <= memory
        for size, source in list(sources.items()):
            if keeps or self.source.skip:
                try:
                    source.keep_decoded(memory if keeps else 0)
                    source.require_a_readable()
                except NoneReadableError as error:
                    warnings.warn(f"the bucket {size[1]} x {size[0]} is left out: {error}", stacklevel=2)
                    self.unreadable.update(source.unreadable)
                    found.bucket_index[found.bucket_index == self.sizes.index(size)] = -1
                    del sources[size]
        if not sources:
            raise UserError(f"none of the {len(self)} images can be read{first_unreadable(self.unreadable)}")
        shapes = [(3, *size) for size in sources]
        return Bucketed([*sources.values()], shapes, str(self.crops(found)))


class Images(Spec):
    """Images resized to the same size, with or without classes.

    Supports a folder with or without class folders, parquet with a column `image` of {bytes, path} as on the Hugging
    Face Hub, and webdataset tar shards with `.cls` labels.
    """

    kind: Literal["images"] = "images"
    # A folder, a file, or a Hub data set. May start with ~ and contain environment variables, such as $NAME.
    root: str = Field(json_schema_extra=PLACE | HUB_DATASET)
    # The side of images in pixels.
    side: int = Field(ge=1, le=PIXELS)
    # Aspect-ratio buckets around the area of `side`. If None, all images are cropped to squares.
    buckets: Buckets | None = Field(default=None, exclude_if=lambda buckets: buckets is None)
    # adm crops as in ADM's ImageNet references. Smaller images are enlarged bicubically.
    crop: Crop = "adm"
    # Mirror half of the images of a batch.
    flip: bool = False
    # Augment the images of a batch. The augment labels are the network's condition (`net.augment`).
    augment: Edm | None = None
    # The split, such as train or test, if file or folder names distinguish several.
    split: str | None = None
    # False ignores existing labels.
    labelled: Literal["auto", False] = "auto"
    # The column of classes in parquet and Hub data sets.
    label: str = "label"
    # Use only the first images, for example for a quick test. None means all.
    count: int | None = Field(default=None, ge=1, le=ROWS, exclude_if=lambda count: count is None)
    # The treatment of unreadable images.
    on_bad: Literal["raise", "skip"] = Field(default="raise", json_schema_extra=FREE)
    # Keep decoded pixels up to this number of GB.
    memory: float = Field(default=2.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)
    # Captions replace classes as conditions.
    captions: Captioning | None = Field(default=None, exclude_if=lambda captions: captions is None)
    # The number of classes, or of captions. 0 means none; if it is not given, it is counted.
    classes: int = Field(default=None, ge=0, le=CLASSES, validate_default=True)
    # The names of the classes. () means classes without names, None not counted yet.
    names: tuple[str, ...] | None = None
    # The names of the classes in the files if only their number is given, for display only.
    titles: tuple[str, ...] = Field(default=(), exclude_if=lambda titles: not titles, json_schema_extra=FREE)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return (3, self.side, self.side)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes (height, width) of the buckets, or ()."""
        return self.buckets.sizes(self.side) if self.buckets else ()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of training samples: one for each bucket, or one."""
        return tuple((3, *size) for size in self.sizes) or (self.shape,)

    @property
    def is_counted(self) -> bool:
        """Whether the number of classes or captions is known. It is not before they are counted in the files."""
        return self.names is not None

    @property
    def labels(self) -> int:
        """The number of classes of the images, 0 with captions in files."""
        if self.captions is None:
            return self.classes
        if isinstance(self.captions, Templates):
            return self.classes // self.captions.num_captions(1)
        return 0

    @field_validator("classes", mode="wrap")
    @classmethod
    def _allow_none(cls, classes: object, validate: Callable[[object], object]) -> object:
        """Allow None for `classes` until `_set_names`, which distinguishes "not given" from 0."""
        return None if classes is None else validate(classes)

    @model_validator(mode="after")
    def _set_names(self) -> "Images":
        """Leave `names` None if classes or captions must be counted. Raises UserError if fields are contradictory."""
        is_given = self.classes is not None  # pyright: ignore[reportUnnecessaryComparison], it may not be given
        match self.captions:
            case CaptionFiles(digest=digest):
                is_counted = is_given and digest is not None
            case Templates(names=names):
                is_counted = is_given and bool(names or self.names)
            case None:
                is_counted = is_given or self.labelled is False
        # Set in place, since `Images(...)` ignores a copy returned by a validator.
        object.__setattr__(self, "names", (self.names or ()) if is_counted else None)
        object.__setattr__(self, "classes", self.classes or 0)
        self.require_agreement()
        return self

    def require_agreement(self) -> None:
        """Raise UserError if fields contradict each other."""
        # Computing the sizes refuses a step that does not divide the side.
        _ = self.sizes
        if self.buckets and self.augment:
            raise UserError("augment needs images of one size, but buckets have several: set augment=null")
        if self.buckets and self.crop == "none":
            raise UserError("crop=none needs images of one size, but buckets have several: set crop=adm")
        if self.source:
            for field, off in _OFF_VALUES.items():
                if getattr(self, field):
                    raise UserError(
                        f"captions.source needs unchanged images, but {field} changes them: set {field}={off}"
                    )
        if self.count and isinstance(self.captions, CaptionFiles):
            raise UserError("count cannot be combined with captions in files, which cover all images: set count=null")
        if self.names and len(self.names) != self.labels:
            raise UserError(f"names has {len(self.names)} names for classes={self.labels}: remove names")
        if self.titles and self.names is not None and len(self.titles) != self.labels:
            raise UserError(f"titles has {len(self.titles)} names for classes={self.labels}: remove titles")
        if self.labelled is False and self.labels:
            raise UserError(f"classes={self.classes} needs labels: remove labelled=false, or set classes=0")
        if self.augment and self.classes:
            if self.captions is None:
                conditions = "classes: set labelled=false and classes=0"
            else:
                conditions = "captions: set captions=null"
            raise UserError(
                f"augment labels, the network's condition c, cannot be combined with the {self.classes} {conditions}, "
                "or augment=null"
            )
        if isinstance(self.captions, Templates) and (self.names or self.captions.names) and self.classes:
            per_class = self.captions.num_captions(1)
            count = len(self.captions.all_captions(self.names or ()))
            if count != self.classes:
                raise UserError(
                    f"captions.templates give {per_class} captions for each of {count // per_class} classes, but "
                    f"data.classes is {self.classes}: set data.classes={count}, or remove it"
                )

    def with_facts(self) -> "Images":
        """Return the spec with the classes and names, or the captions, in the files; unchanged if there are no files.

        Nothing is downloaded. Raises UserError if files and spec contradict each other.
        """
        root = self._existing_place()
        if root is None:
            return self
        if self.is_counted:
            titles = self._find_titles(root)
            return self.model_copy(update={"titles": titles}) if titles else self
        if isinstance(self.captions, CaptionFiles):
            facts = self._count_captions(root, self.captions)
        else:
            facts = self._count_classes(root)
        images = self.model_copy(update=facts)
        images.require_agreement()
        return images

    @property
    def is_here(self) -> bool:
        """Whether the images are on this machine, without contacting the Hub."""
        return self._existing_place() is not None

    def fetch(self) -> None:
        """Download the images if they are a Hub data set. Raises the Hub's errors."""
        place = self._place()
        if isinstance(place, str):
            hub.load_dataset(place)

    def _place(self) -> Path | str:
        """Return the path of the images, or the name of a Hub data set.

        Raises UserError if an environment variable is not set.
        """
        if hub.is_hub_name(self.root):
            return hub.local_copy(self.root) or self.root
        return user_path(self.root, "data.root")

    def _existing_place(self) -> Path | str | None:
        """Return the place of the images; None if they are not on this machine."""
        try:
            place = self._place()
        except UserError:
            return None
        is_here = hub.is_prepared(place) if isinstance(place, str) else place.exists()
        return place if is_here else None

    def _find_titles(self, place: Path | str) -> tuple[str, ...]:
        """Return the class names in parquet files if only the number of classes is given, or ().

        Only files in the root and its folder `data` are considered, since walking a million images takes minutes.
        """
        is_number_given = self.labels > 0 and not (self.names or self.titles or self.captions)
        if not is_number_given:
            return ()
        if isinstance(place, Path) and not (any(place.glob("*.parquet")) or any(place.glob("data/*.parquet"))):
            return ()
        try:
            rows = self._open_rows(place)
            names = rows.class_names.get(self._label_column(rows), ())
        except UserError:
            # Opening the images raises it again.
            return ()
        return names if len(names) == self.labels else ()

    def _count_classes(self, place: Path | str) -> dict[str, Any]:
        """Return the fields `classes` and `names` of the images. With templates, `classes` counts captions."""
        rows = self._open_rows(place)
        labels = labels_of(rows, self._label_column(rows))
        if labels is None and isinstance(rows, ParquetRows | DatasetRows):
            self._check_missing_labels(rows)
        per_class = 1
        if isinstance(self.captions, Templates):
            if labels is None:
                raise UserError(f"captions.templates need classes, but {place} has none: set captions.kind=files")
            per_class = self.captions.num_captions(1)
        if labels is None:
            return {"classes": self.classes, "names": ()}
        return {"classes": self.classes or per_class * labels.count, "names": labels.names}

    def _label_column(self, rows: Rows) -> str:
        """Return the column of classes: `label`, or the only column of class type if no column has the default name."""
        is_default = self.label == type(self).model_fields["label"].default
        if is_default and self.label not in rows.columns() and len(rows.class_names) == 1:
            return next(iter(rows.class_names))
        return self.label

    def _check_missing_labels(self, rows: Rows) -> None:
        """Raise UserError if tables lack a column `label` set by the user; warn if another column may have classes."""
        if self.label != type(self).model_fields["label"].default:
            raise UserError(
                f"{rows.root} has no column '{self.label}' (it has {', '.join(rows.columns())}): set data.label, or "
                "data.labelled=false"
            )
        if rows.integer_columns():
            warn_once(
                f"{rows.root} has no column '{self.label}', so its images have no classes. Columns of integers are "
                f"{', '.join(rows.integer_columns())}: set `label` of the images to one of these, or labelled=false"
            )

    def _count_captions(self, root: Path | str, files: CaptionFiles) -> dict[str, Any]:
        """Return the fields `classes`, `names` and `captions`, with the number of captions and their digest."""
        captions = self._read_captions(root, files)
        count = len(captions)
        if self.classes not in (0, count):
            raise UserError(f"{root} has {count} captions, but data.classes is {self.classes}: remove data.classes")
        with_digest = files.model_copy(update={"digest": captions.digest()})
        return {"classes": count, "names": (), "captions": with_digest}

    def _read_captions(self, root: Path | str, files: CaptionFiles) -> Captions:
        """Read the captions of the images. Many images without captions are refused until the run has a digest."""
        texts = captions_of(self._open_rows(root), files.name, files.source, is_new=files.digest is None)
        return Captions.from_images(texts[: self.count])

    @model_serializer(mode="wrap")
    def _dump(self, dump: Callable[["Images"], dict[str, Any]]) -> dict[str, Any]:
        """Serialize the fields, without empty `names`; `classes` is None if they are still to be counted."""
        fields = dump(self)
        if not self.names:
            fields.pop("names", None)
        if not self.is_counted:
            fields["classes"] = self.classes or None
        return fields

    def open(self) -> Source | Bucketed | Captioned:
        """Return the images as a source with classes or captions, all decoded if they fit in `memory`.

        Raises UserError if there are no images, if files are damaged, if classes or captions differ from the spec, or
        if an image is unreadable.
        """
        images = self.rows()
        source: Source | Bucketed
        if isinstance(images, BucketedImages):
            source = images.open(self.memory * GIGABYTE)
        else:
            source = images.keep_decoded(self.memory * GIGABYTE)
        return with_captions(source, self.all_captions()) if self.captions else source

    def originals(self) -> Source:
        """Return the images as squares with their classes, without captions or buckets.

        Raises UserError if there are no images, if files are damaged, or if classes differ from the spec.
        """
        return self._source(class_per_image=False).keep_decoded(self.memory * GIGABYTE)

    def rows(self) -> Source | BucketedImages:
        """Return the images in order, not decoded, with their classes or, with captions in files, their numbers.

        Raises UserError if there are no images, if files are damaged, or if classes differ from the spec.
        """
        source = self._source(class_per_image=isinstance(self.captions, CaptionFiles))
        return BucketedImages(source, self.buckets, self.side) if self.buckets else source

    def crops(self) -> Crops | None:
        """Summarize the cropping by buckets, from image headers; None without buckets."""
        if not self.buckets:
            return None
        images = self.rows()
        assert isinstance(images, BucketedImages)
        return images.crops(images.find(range(len(images))))

    def all_captions(self) -> Captions:
        """Return the captions by class (templates) or by image (files).

        Raises UserError if they are missing or have changed.
        """
        if isinstance(self.captions, Templates):
            return self.captions.all_captions(self.names or ())
        if not isinstance(self.captions, CaptionFiles):
            return Captions.from_images([])
        root = self._place()
        captions = self._read_captions(root, self.captions)
        self.captions.require(captions, str(root))
        return captions

    @property
    def source(self) -> str | None:
        """The column of the image that each caption edits, or None."""
        return self.captions.source if isinstance(self.captions, CaptionFiles) else None

    def source_images(self) -> dict[str, Path]:
        """Return the images that captions edit, by their hashes. Raises UserError if one is missing."""
        rows = self._open_rows(self._place())
        edits_by_image = edited_images(rows, self.source or "")
        return {image_hash(file): file for edits in edits_by_image for _, file in edits}

    def caption_texts(self) -> tuple[str, ...]:
        """Return the text of each caption by its number, or (). Raises UserError if they are missing or changed."""
        return cached_captions(self).texts if self.captions else ()  # pyright: ignore[reportArgumentType], specs are frozen

    def open_rows(self) -> Rows:
        """Open the encoded images. Raises UserError if there are none."""
        return self._open_rows(self._place())

    def ledger(self) -> Ledger | None:
        """Return the ledger of the images, without hashes; None if they are not on this machine.

        Raises UserError or OSError if they cannot be opened.
        """
        if not self.is_here:
            return None
        try:
            return self._source(class_per_image=False).ledger
        except NoImagesError:
            # The folder is empty, as if a disk is not mounted.
            return None

    def _open_rows(self, root: Path | str) -> Rows:
        """Open the encoded images at a place. Raises UserError if there are fewer than `count`."""
        rows = open_rows(root, self.split)
        if self.count is not None and self.count > len(rows):
            raise UserError(
                f"{root} has {len(rows)} images, but count is {self.count}: set count=null to use all images"
            )
        return rows

    def _source(self, *, class_per_image: bool) -> Source:
        """Return a source of squares, not decoded. `class_per_image` uses image numbers as classes."""
        rows = self.open_rows()
        labels = labels_of(rows, self._label_column(rows)) if self.labelled and self.labels else None
        self._require_classes(rows, labels)
        return Source(
            rows,
            ToSquare(self.side, self.crop),
            labels,
            flip=self.flip,
            augment=self.augment,
            skip=self.on_bad == "skip",
            class_per_image=class_per_image,
            chosen=None if self.count is None else torch.arange(self.count),
        )

    def _require_classes(self, rows: Rows, labels: Labels | None) -> None:
        """Raise UserError if classes differ from the spec. If they have no names, the last ones may lack images."""
        root = rows.root
        if not self.is_counted:
            raise UserError(f"{root} did not exist when the run was opened, so its classes are unknown: open it again")
        if not self.labels:
            return
        if labels is None:
            columns = f" (no column '{self.label}' among {', '.join(rows.columns())})" if rows.columns() else ""
            raise UserError(f"{root} has no labels{columns}, but data.classes is {self.classes}: set data.classes=0")
        if self.names and labels.names != self.names:
            missing = sorted(set(self.names) - set(labels.names))
            added = sorted(set(labels.names) - set(self.names))
            changes: list[str] = []
            if missing:
                changes.append(f"without {first_few(missing, max_items=_MAX_NAMED)}")
            if added:
                changes.append(f"with {first_few(added, max_items=_MAX_NAMED)}")
            raise UserError(
                f"{root} has different classes than the run was created with, "
                f"{'; '.join(changes) or 'in another order'}: restore the names of the folders, or start a new run"
            )
        if labels.count > self.labels or (labels.names and labels.count < self.labels):
            per_class = self.classes // self.labels
            captions = f" with {per_class} captions each" if self.captions else ""
            raise UserError(
                f"{root} has {labels.count} classes{captions}, but data.classes is {self.classes}: set "
                f"data.classes={labels.count * per_class}"
            )


_FIELDS_OF_IMAGES = re.compile(rf"\bdata\.(?={'|'.join(Images.model_fields)})\b")


@contextmanager
def rename_fields_in_errors() -> Generator[None]:
    """Rename fields in errors for runs with latents, from `data.root` to `data.images.root`."""
    try:
        yield
    except UserError as error:
        raise UserError(rename_fields(str(error))) from error


def rename_fields(message: str) -> str:
    """Rename the fields of images in a message for runs with latents."""
    return _FIELDS_OF_IMAGES.sub("data.images.", message)
