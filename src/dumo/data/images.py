"""A user's own images as a source to train on.

- `Images` is the spec, `data` of a run with `kind: images`. It reads no disk until it is asked: `Images.with_facts`
  counts the classes or captions that the spec does not say, once, when a run is opened; `Images.open` makes a source.
- `Source` decodes images: `batch` for a training step, `reference` to compare samples with, `rows` to go through all
  once. Every image that is read is compared with what it was before (`dumo.data.ledger`).
- `BucketedImages` assigns images to buckets of several sizes.

`dumo.data.rows` opens the files, and `dumo.data.pixel` decodes them.
"""

import os
import re
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

MAX_THREADS = min(16, cores())  # that decode at once
UNREADABLE_FIX = "repair or remove it, or leave such images out with data.on_bad=skip"
_OFF_VALUES = {"flip": "false", "buckets": "null", "augment": "null"}  # by which a field leaves images as they are
_MAX_CLASSES = 10**6
_MAX_NAMED = 8  # classes that a message names
# Images that are decoded, or whose sizes are read, between two looks at signals.
_WINDOW = 1024

Pixels = UInt8[Tensor, "n c h w"]
Numbers = Int64[Tensor, " n"]  # of rows, of images, or of classes


@dataclass(frozen=True)
class Labels:
    """The class of each image, and how many classes there are.

    If the classes have names, their number is known; otherwise it is one more than the largest class number.
    """

    c: Tensor  # (n,), Long, in 0 ... count - 1
    count: int
    names: tuple[str, ...] = ()


def labels_of(rows: Rows, label: str = "label") -> Labels | None:
    """The classes of images: of folders, of .cls members, or of the column `label`; None if there are none.

    Raises UserError if only some images have a class, or a class is no number from 0 on.
    """
    if isinstance(rows, FolderRows):
        folders = rows.class_folders
        names = sorted(set(folders))
        if names == [""]:
            return None
        if names[0] == "":
            raise UserError(
                f"{rows.root} holds images both in folders ({first_few(names[1:], max_items=_MAX_NAMED)}) and outside "
                "them, which are of no class: set data.labelled=false, or move them"
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
            f"{rows.path(values.index(None))} has no class in '{column}', others have: set data.labelled=false"
        )
    if all(isinstance(value, str) for value in values) and not isinstance(rows, TarRows):
        return _named_labels(values)
    wrong = next((i for i, value in enumerate(values) if isinstance(value, bool) or not isinstance(value, int)), None)
    if wrong is not None:
        raise UserError(
            f"{rows.path(wrong)}: '{column}' holds no class number: {values[wrong]!r}; set data.label or "
            "data.labelled=false"
        )
    return number_labels(values, where, rows.class_names.get(column, ()))


def number_labels(values: Sequence[int], where: str, names: Sequence[str] = ()) -> Labels:
    """Count the classes of numbers. `names` are those of the classes, if they are known.

    Warns of classes without an image: numbers that begin at 1, or ids, make classes that nothing is learned of. Raises
    UserError for a number that is no class, and for more classes than any network has.
    """
    low = min(values)
    high = max(values)
    fix = "name the column of classes with data.label, number them from 0, or set data.labelled=false"
    if low < 0 or (names and high >= len(names)):
        raise UserError(f"{where} has the class {low if low < 0 else high}, which does not exist: {fix}")
    if high >= _MAX_CLASSES:
        raise UserError(f"{where} has the class {high}, and {_MAX_CLASSES:,} classes are the most: {fix}")
    num_empty = high + 1 - len(set(values))
    if not names and num_empty:
        warn_once(
            f"{where} has classes from {low:,} to {high:,}, so there are {high + 1:,}, and {num_empty:,} of them have "
            "no image: number them from 0 without gaps"
        )
    return Labels(torch.tensor(values, dtype=torch.long), len(names) or high + 1, tuple(names))


def _named_labels(values: Sequence[str]) -> Labels:
    """The classes of names, numbered in the order of the names."""
    names = sorted(set(values))
    number_of = {name: number for number, name in enumerate(names)}
    return Labels(torch.tensor([number_of[value] for value in values]), len(names), tuple(names))


class NoneReadableError(UserError):
    """No image can be read."""


class Source:
    """Images of some rows in [-1, 1], with their classes. `size` and `len` count them, readable or not.

    An image that cannot be read raises UserError with its name. With `skip` it is warned of instead, and replaced by
    the next that can be read in a batch, or left out where all images are gone through once.
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
        """Read nothing yet.

        - `to_pixels`: brings an image to its size
        - `labels`: the classes of all images of `encoded`; None: there are none, and all are 0
        - `flip`: mirror half of the images of a batch
        - `class_per_image`: each image is a class of its own
        - `chosen`: the numbers of the images to offer; None: all
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
        self.decoded: Pixels | None = None  # the pixels of all rows, if they are kept
        self.is_decoded = torch.zeros(0, dtype=torch.bool)  # of which rows they are there
        self.unreadable: dict[int, str] = {}  # why an image cannot be read, by its number
        self._num_warned = 0
        self._lock = Lock()
        self._slots = Semaphore(MAX_THREADS)  # for all batches that are made at once

    def subset(self, chosen: Numbers, size: Size | None = None) -> "Source":
        """Some of the images, by number, brought to another size if one is given."""
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
        """Keep pixels once they are decoded, if those of all images take at most `memory` bytes. Returns this source.

        With `now` all images are decoded now. Raises UserError for an image that cannot be read, unless such images are
        skipped; and if none can be read.
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
        self.warn_of_unreadable("left out, in a batch replaced by the next")
        return self

    def __len__(self) -> int:
        return len(self.encoded) if self.chosen is None else len(self.chosen)

    @property
    def size(self) -> int:
        """The number of images."""
        return len(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, if they have names."""
        return self.labels.names if self.labels else ()

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Some rows of a step's batch: images (b, 3, h, w), with their classes (b,), or with augment labels (b, n).

        Epoch follows epoch, each in its own order; half of the images are mirrored if `flip`. A function of its
        arguments alone.
        """
        pixels, c = self._read_with_replacements(rows_of(step, batch_size, size=len(self), seed=seed, rows=rows))
        self.warn_of_unreadable("left out, in a batch replaced by the next", min_growth=2)
        if self.flip:
            is_mirrored = mirrored_rows(step, batch_size, seed, rows)[:, None, None, None]
            pixels = torch.where(is_mirrored, pixels.flip(-1), pixels)
        x = from_uint8(pixels)
        if not self.augment:
            return x, c
        augmentation = self.augment.draw(batch_size, stream(seed, step, "augment"))[rows]
        return self.augment(x, augmentation), augmentation.augment_labels

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Numbers:
        """The numbers of the images of a step's batch, (b,), also of those that cannot be read."""
        return self.image_numbers(rows_of(step, batch_size, size=len(self), seed=seed, rows=rows))

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """All images if they are kept decoded, otherwise the i-th choice of n; with their classes, not mirrored."""
        if self.decoded is not None or n >= len(self):
            return self.rows(slice(None))
        return self.at(torch.randperm(len(self), generator=stream(seed, "reference", i))[:n])

    def rows(self, rows: slice | Numbers) -> tuple[Tensor, Tensor]:
        """Some rows in their own order, with their classes, not mirrored; without images that cannot be read."""
        return self.at(torch.arange(len(self))[rows])

    def at(self, rows: Numbers) -> tuple[Tensor, Tensor]:
        """Images by row, with their classes, not mirrored; without images that cannot be read."""
        numbers = self.image_numbers(rows)
        pixels, is_read = self._pixels(rows, numbers)
        self.warn_of_unreadable("left out", min_growth=2)
        if not is_read.all():
            pixels = pixels[is_read]
        return from_uint8(pixels), self._classes(numbers[is_read])

    def image_numbers(self, rows: Numbers) -> Numbers:
        """The numbers in `encoded` of some rows, (n,)."""
        return rows if self.chosen is None else self.chosen[rows]

    def readable_numbers(self, rows: range) -> list[int]:
        """The numbers of the images that `Source.rows` gave for a range of rows."""
        return [i for i in self.image_numbers(torch.tensor(rows)).tolist() if i not in self.unreadable]

    def readable_labels(self) -> Numbers | None:
        """The classes of the images that can be read; None if that is all, or not known yet, or each is a class."""
        if self.decoded is None or not self.unreadable or self.class_per_image:
            return None
        return self._classes(torch.tensor(self.readable_numbers(range(len(self)))))

    def sizes(self, rows: range) -> Iterator[Size | None]:
        """The height and width of each image of a range of rows, upright; None where it cannot be read and is skipped.

        Reads whole files, but decodes only what has no size in its header.
        """
        numbers = self.image_numbers(torch.tensor(rows)).tolist()
        with ThreadPoolExecutor(MAX_THREADS, "sizes") as pool, bar("reading the sizes of images", len(rows)) as tick:
            for first in range(0, len(numbers), _WINDOW):
                signals.check()
                window = numbers[first : first + _WINDOW]
                yield from pool.map(lambda i: self._read(i, upright_size), window)
                tick(first + len(window), "")

    def fingerprint(self) -> str:
        """A short text, another one if images are added, removed or renamed, or get another size or class."""
        chosen = "" if self.chosen is None else f"first {len(self.chosen)}"
        return self.ledger.fingerprint(*self.names, chosen)

    def warn_of_unreadable(self, fate: str, *, min_growth: int = 1) -> None:
        """Warn of images that could not be read since the last warning, in one line, with what becomes of them.

        Nothing is said until they are `min_growth` times as many as at that warning, so that batches give few lines.
        """
        with self._lock:
            num_bad = len(self.unreadable)
            if num_bad < max(1, min_growth * self._num_warned) or num_bad == self._num_warned:
                return
            new = sorted(list(self.unreadable)[self._num_warned : num_bad])
            self._num_warned = num_bad
        examples = first_few(self.unreadable[i] for i in new)
        warnings.warn(f"{num_bad} of {len(self)} images cannot be read and are {fate}: {examples}", stacklevel=3)

    def _classes(self, numbers: Numbers) -> Numbers:
        """The classes of images, by their numbers."""
        if self.class_per_image:
            return numbers
        return self.labels.c[numbers] if self.labels else torch.zeros(len(numbers), dtype=torch.long)

    def _read_with_replacements(self, rows: Numbers) -> tuple[Pixels, Numbers]:
        """The pixels and classes of some rows. An image that cannot be read is replaced by the next that can."""
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
        """The pixels of images, given by row and by number, and which of them can be read."""
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
        """Read and decode images on threads. Returns their pixels, and which of them can be read."""
        pixels = torch.zeros(len(numbers), *self.to_pixels.shape, dtype=torch.uint8)
        is_read = torch.ones(len(numbers), dtype=torch.bool)

        def decode(k: int) -> None:
            with self._slots:
                image = self._read(int(numbers[k]), self.to_pixels)
            if image is None:
                is_read[k] = False
            else:
                pixels[k] = image

        # The pool is made anew for each batch, which takes a millisecond, so that none is left in a forked process.
        pool = ThreadPoolExecutor(min(MAX_THREADS, max(1, len(numbers))), "decode")
        try:
            for window in torch.arange(len(numbers)).split(_WINDOW):
                list(pool.map(decode, window.tolist()))
        finally:
            pool.shutdown(cancel_futures=True)
        return pixels, is_read

    def _read(self, i: int, function: Callable[[bytes], Any]) -> Any:  # noqa: ANN401, what the function returns
        """Read image i, compare it with what it was before, and apply a function to its bytes.

        Returns None if it cannot be read and is skipped; raises UserError if it is not skipped, or has changed.
        """
        if i in self.unreadable:
            return None
        try:
            data = self.encoded.read(i)
        except (OSError, ValueError) as error:
            return self._note_unreadable(i, error)
        self.ledger.check(i, data)
        try:
            return function(data)
        except ValueError as error:
            return self._note_unreadable(i, error)

    def _note_unreadable(self, i: int, error: Exception) -> None:
        """Note why image i cannot be read. Raises UserError unless such images are skipped."""
        text = unreadable_text(self.encoded.path(i), error)
        if not self.skip:
            raise UserError(f"{text}: {UNREADABLE_FIX}") from error
        self.unreadable[i] = text

    def require_a_readable(self) -> None:
        """Raise NoneReadableError if no image can be read. Decodes images until one can be."""
        if self.decoded is None:
            for i in self.image_numbers(torch.arange(len(self))).tolist():
                if self._read(i, self.to_pixels) is not None:
                    return
        self._require_any_readable()

    def _require_any_readable(self) -> None:
        """Raise NoneReadableError if no image could be read."""
        if len(self.unreadable) >= len(self):
            raise NoneReadableError(f"none of the {len(self)} images can be read{first_unreadable(self.unreadable)}")


def unreadable_text(path: str, error: Exception) -> str:
    """Which image cannot be read, and why; with what to do about the formats of telephones."""
    reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if isinstance(error, Unreadable):
        reason = str(error)
    if os.path.splitext(path)[1].lower() in UNREADABLE_SUFFIXES:
        reason += "; convert it to JPEG or PNG"
    return f"{path} {reason}"


def first_unreadable(unreadable: dict[int, str]) -> str:
    """The end of a message that no image can be read: the first of them, and why; "" if that is not known."""
    return f"; the first: {unreadable[min(unreadable)]}" if unreadable else ""


@dataclass(frozen=True)
class RowsInBuckets:
    """A range of images, each with its bucket."""

    rows: range
    bucket_index: Int64[Tensor, " n"]  # of each, an index of `BucketedImages.sizes`; -1 if it cannot be read
    cropped: Float[Tensor, " n"]  # the share of each that is cut off; 0 of an image that cannot be read


class BucketedImages:
    """Images in buckets of several sizes: to go through by ranges of rows, or to open as a source."""

    def __init__(self, source: Source, buckets: Buckets, side: int) -> None:
        """Read nothing yet. `source` has all images, in whatever size."""
        self.source = source
        self.groups = buckets.groups(side)
        self.sizes = buckets.sizes(side)
        self.ledger = source.ledger
        self.names = source.names

    def __len__(self) -> int:
        return len(self.source)

    @property
    def unreadable(self) -> dict[int, str]:
        """Why an image cannot be read, by its number."""
        return self.source.unreadable

    def find(self, rows: range) -> RowsInBuckets:
        """Find the buckets of a range of images, by their headers."""
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

    def parts(self, found: RowsInBuckets) -> dict[Size, Source]:
        """The images of a range, a source for each size that has some."""
        parts: dict[Size, Source] = {}
        for k, size in enumerate(self.sizes):
            places = (found.bucket_index == k).nonzero().flatten()
            if len(places):
                parts[size] = self.source.subset(self.source.image_numbers(places + found.rows.start), size)
        return parts

    def crops(self, found: RowsInBuckets) -> Crops:
        """What the buckets leave of the images of a range that can be read."""
        is_read = found.bucket_index >= 0
        return Crops.of(self.sizes, found.bucket_index[is_read], found.cropped[is_read])

    def open(self, memory: float) -> Bucketed:
        """All images, to train on; kept decoded if they take at most `memory` bytes.

        A bucket of which no image can be decoded is left out if such images are skipped. Raises UserError if none is
        left.
        """
        found = self.find(range(len(self)))
        parts = self.parts(found)
        keeps = sum(3 * prod(size) * len(part) for size, part in parts.items()) <= memory
        for size, part in list(parts.items()):
            if keeps or self.source.skip:
                try:
                    part.keep_decoded(memory if keeps else 0)
                    part.require_a_readable()
                except NoneReadableError as error:
                    warnings.warn(f"the bucket {size[1]} x {size[0]} is left out: {error}", stacklevel=2)
                    self.unreadable.update(part.unreadable)
                    found.bucket_index[found.bucket_index == self.sizes.index(size)] = -1
                    del parts[size]
        if not parts:
            raise UserError(f"none of the {len(self)} images can be read{first_unreadable(self.unreadable)}")
        shapes = [(3, *size) for size in parts]
        return Bucketed([*parts.values()], shapes, str(self.crops(found)))


class Images(Spec):
    """Images brought to one size, with a class each or none.

    A folder with a folder per class, or a flat one; parquet with a column `image` of {bytes, path}, as on the Hugging
    Face hub; webdataset tar shards with `.cls` labels.
    """

    kind: Literal["images"] = "images"
    # A folder, a file, or a data set of the Hub; may begin with ~ and hold $NAMES of environment variables.
    root: str = Field(json_schema_extra=PLACE | HUB_DATASET)
    side: int = Field(ge=1, le=PIXELS)  # pixels
    # Sizes around the area of `side`, in which images are trained on; None: all are cut to squares of it.
    buckets: Buckets | None = Field(default=None, exclude_if=lambda buckets: buckets is None)
    crop: Crop = "adm"  # adm: as the ImageNet references were made; smaller images are enlarged, bicubically
    flip: bool = False  # mirror half of the images of a batch
    augment: Edm | None = None  # transform the images of a batch; the net reads how, in `net.augment` numbers
    split: str | None = None  # train, test ...: the part of the data, where there are several by their names
    labelled: Literal["auto", False] = "auto"  # false: the labels there are, are not read
    label: str = "label"  # the column of classes in parquet and in data sets of the Hub
    # The first of the images alone, in their order, as for a quick try; None: all.
    count: int | None = Field(default=None, ge=1, le=ROWS, exclude_if=lambda count: count is None)
    on_bad: Literal["raise", "skip"] = Field(default="raise", json_schema_extra=FREE)  # an image that cannot be read
    memory: float = Field(default=2.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)  # GB of pixels kept decoded; ours
    captions: Captioning | None = Field(default=None, exclude_if=lambda captions: captions is None)  # for classes
    # 0: none; not given: those that are there. With captions: how many there are of them.
    classes: int = Field(default=None, ge=0, le=CLASSES, validate_default=True)
    names: tuple[str, ...] | None = None  # of the classes; (): they have none; None: not counted yet
    # Where only the number of classes is given: what the files call them. People read it, the training does not.
    titles: tuple[str, ...] = Field(default=(), exclude_if=lambda titles: not titles, json_schema_extra=FREE)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return (3, self.side, self.side)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the buckets, height and width; () where there are none."""
        return self.buckets.sizes(self.side) if self.buckets else ()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of samples that are trained on: one for each bucket, or one."""
        return tuple((3, *size) for size in self.sizes) or (self.shape,)

    @property
    def is_counted(self) -> bool:
        """Whether it is known how many classes or captions there are; False before they are counted in the files."""
        return self.names is not None

    @property
    def labels(self) -> int:
        """The number of classes of the images themselves; 0 with captions that were written of each image."""
        if self.captions is None:
            return self.classes
        if isinstance(self.captions, Templates):
            return self.classes // self.captions.num_captions(1)
        return 0

    @field_validator("classes", mode="wrap")
    @classmethod
    def _allow_none(cls, classes: object, validate: Callable[[object], object]) -> object:
        """Let `classes` be None until `_set_names`, which tells "not given" from 0."""
        return None if classes is None else validate(classes)

    @model_validator(mode="after")
    def _set_names(self) -> "Images":
        """Leave `names` None where classes or captions are to be counted. Raises UserError where fields contradict."""
        is_given = self.classes is not None  # pyright: ignore[reportUnnecessaryComparison], it may not be given
        match self.captions:
            case CaptionFiles(digest=digest):
                is_counted = is_given and digest is not None
            case Templates(names=names):
                is_counted = is_given and bool(names or self.names)
            case None:
                is_counted = is_given or self.labelled is False
        # set in place: where `Images(...)` is called, a copy that a validator returns is lost
        object.__setattr__(self, "names", (self.names or ()) if is_counted else None)
        object.__setattr__(self, "classes", self.classes or 0)
        self.require_agreement()
        return self

    def require_agreement(self) -> None:
        """Raise UserError where fields contradict each other."""
        _ = self.sizes  # refuses a step that does not divide the side
        if self.buckets and self.augment:
            raise UserError("buckets bring images to their sizes, and augment is of one size: set augment=null")
        if self.buckets and self.crop == "none":
            raise UserError("buckets bring images to their sizes, and crop is of one size: set crop=adm")
        if self.source:
            for field, off in _OFF_VALUES.items():
                if getattr(self, field):
                    raise UserError(
                        f"captions.source edits images as they are, and {field} changes them: set {field}={off}"
                    )
        if self.count and isinstance(self.captions, CaptionFiles):
            raise UserError("captions are of all images, and count takes the first ones: set count=null")
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
                f"augment gives the net numbers as its condition c, but so do the {self.classes} {conditions}, or "
                "augment=null"
            )
        if isinstance(self.captions, Templates) and (self.names or self.captions.names) and self.classes:
            per_class = self.captions.num_captions(1)
            count = len(self.captions.all_captions(self.names or ()))
            if count != self.classes:
                raise UserError(
                    f"captions.templates make {per_class} captions of each of {count // per_class} classes, "
                    f"data.classes says {self.classes}: set data.classes={count}, or leave it out"
                )

    def with_facts(self) -> "Images":
        """The spec with the classes and names, or the captions, that the files have; as it is if no files are there.

        Nothing is downloaded. Raises UserError if they contradict what the spec says.
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
        """Whether the images are on this machine. Asks nobody."""
        return self._existing_place() is not None

    def fetch(self) -> None:
        """Download the images if they are a data set of the Hub. Raises the Hub's errors."""
        place = self._place()
        if isinstance(place, str):
            hub.load_dataset(place)

    def _place(self) -> Path | str:
        """The folder or file of the images, or the name of a data set of the Hub.

        Raises UserError for an environment variable that is not set.
        """
        if hub.is_hub_name(self.root):
            return hub.local_copy(self.root) or self.root
        return user_path(self.root, "data.root")

    def _existing_place(self) -> Path | str | None:
        """Where the images are; None if they are not on this machine."""
        try:
            place = self._place()
        except UserError:
            return None
        is_here = hub.is_prepared(place) if isinstance(place, str) else place.exists()
        return place if is_here else None

    def _find_titles(self, place: Path | str) -> tuple[str, ...]:
        """What tables of parquet call the classes, if only their number is given; () if they do not say.

        Only tables in the root and its folder `data` count: to walk folders of a million images takes minutes.
        """
        is_number_given = self.labels > 0 and not (self.names or self.titles or self.captions)
        if not is_number_given:
            return ()
        if isinstance(place, Path) and not (any(place.glob("*.parquet")) or any(place.glob("data/*.parquet"))):
            return ()
        try:
            rows = self._open_rows(place)
            names = rows.class_names.get(self._label_column(rows), ())
        except UserError:  # it is raised again when the images are opened
            return ()
        return names if len(names) == self.labels else ()

    def _count_classes(self, place: Path | str) -> dict[str, Any]:
        """The fields `classes` and `names` of the images there are; templates count a class for each caption."""
        rows = self._open_rows(place)
        labels = labels_of(rows, self._label_column(rows))
        if labels is None and isinstance(rows, ParquetRows | DatasetRows):
            self._say_without_labels(rows)
        per_class = 1
        if isinstance(self.captions, Templates):
            if labels is None:
                raise UserError(f"captions.templates name classes, and {place} has none: set captions.kind=files")
            per_class = self.captions.num_captions(1)
        if labels is None:
            return {"classes": self.classes, "names": ()}
        return {"classes": self.classes or per_class * labels.count, "names": labels.names}

    def _label_column(self, rows: Rows) -> str:
        """The column of classes: `label`, or if no column has that default name, the only one whose type is a class."""
        is_default = self.label == type(self).model_fields["label"].default
        if is_default and self.label not in rows.columns() and len(rows.class_names) == 1:
            return next(iter(rows.class_names))
        return self.label

    def _say_without_labels(self, rows: Rows) -> None:
        """Raise UserError if tables lack the column of classes that was named; warn if they may have another one."""
        if self.label != type(self).model_fields["label"].default:
            raise UserError(
                f"{rows.root} has no column '{self.label}' (it has {', '.join(rows.columns())}): set data.label, or "
                "data.labelled=false"
            )
        if rows.integer_columns():
            warn_once(
                f"{rows.root} has no column '{self.label}', so its images have no classes. Integers are in "
                f"{', '.join(rows.integer_columns())}: set `label` of the images to one of these, or labelled=false"
            )

    def _count_captions(self, root: Path | str, files: CaptionFiles) -> dict[str, Any]:
        """The fields `classes`, `names` and `captions`, with the captions there are and their digest."""
        captions = self._read_captions(root, files)
        count = len(captions)
        if self.classes not in (0, count):
            raise UserError(f"{root} has {count} captions, data.classes says {self.classes}: leave it out")
        with_digest = files.model_copy(update={"digest": captions.digest()})
        return {"classes": count, "names": (), "captions": with_digest}

    def _read_captions(self, root: Path | str, files: CaptionFiles) -> Captions:
        """The captions of the images. Until a run has a digest of them, few images may lack one."""
        texts = captions_of(self._open_rows(root), files.name, files.source, is_new=files.digest is None)
        return Captions.from_images(texts[: self.count])

    @model_serializer(mode="wrap")
    def _dump(self, dump: Callable[["Images"], dict[str, Any]]) -> dict[str, Any]:
        """The fields, without `names` where there are none; `classes` is None where they are still to be counted."""
        fields = dump(self)
        if not self.names:
            fields.pop("names", None)
        if not self.is_counted:
            fields["classes"] = self.classes or None
        return fields

    def open(self) -> Source | Bucketed | Captioned:
        """The images as a source, all decoded if they fit in `memory`, each with its class or a caption.

        Raises UserError if there are no images, files are damaged, classes or captions are not those expected, or an
        image cannot be read.
        """
        images = self.rows()
        source: Source | Bucketed
        if isinstance(images, BucketedImages):
            source = images.open(self.memory * GIGABYTE)
        else:
            source = images.keep_decoded(self.memory * GIGABYTE)
        return with_captions(source, self.all_captions()) if self.captions else source

    def originals(self) -> Source:
        """The images as squares with their classes, without captions or buckets.

        Raises UserError if there are no images, files are damaged, or classes are not those expected.
        """
        return self._source(class_per_image=False).keep_decoded(self.memory * GIGABYTE)

    def rows(self) -> Source | BucketedImages:
        """The images to go through in order, none decoded, with their classes or, with captions, their numbers.

        Raises UserError if there are no images, files are damaged, or classes are not those expected.
        """
        source = self._source(class_per_image=isinstance(self.captions, CaptionFiles))
        return BucketedImages(source, self.buckets, self.side) if self.buckets else source

    def crops(self) -> Crops | None:
        """What the buckets leave of the images, by their headers; None without buckets. Raises UserError."""
        if not self.buckets:
            return None
        images = self.rows()
        assert isinstance(images, BucketedImages), "there are buckets"
        return images.crops(images.find(range(len(images))))

    def all_captions(self) -> Captions:
        """The captions by class, or by image where they were written of each image.

        Raises UserError where they are missing, or are not those expected.
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
        """The column of the image that each caption edits; None: captions are texts alone."""
        return self.captions.source if isinstance(self.captions, CaptionFiles) else None

    def source_images(self) -> dict[str, Path]:
        """The images that captions edit, by their hashes. Raises UserError if one is missing."""
        rows = self._open_rows(self._place())
        edits_by_image = edited_images(rows, self.source or "")
        return {image_hash(file): file for edits in edits_by_image for _, file in edits}

    def caption_texts(self) -> tuple[str, ...]:
        """The text of each caption, by its number; () where there are none.

        Raises UserError where they are missing, or are not those expected.
        """
        return cached_captions(self).texts if self.captions else ()  # pyright: ignore[reportArgumentType], specs are frozen

    def open_rows(self) -> Rows:
        """The encoded images, with all that is known of them. Raises UserError if there are none."""
        return self._open_rows(self._place())

    def ledger(self) -> Ledger | None:
        """The ledger of the images, with no hash yet; None if they are not on this machine.

        Raises UserError or OSError if they are, and cannot be opened.
        """
        if not self.is_here:
            return None
        try:
            return self._source(class_per_image=False).ledger
        except NoImagesError:  # an empty folder where a disk is not mounted
            return None

    def _open_rows(self, root: Path | str) -> Rows:
        """The encoded images at a place. Raises UserError if there are fewer than `count`."""
        rows = open_rows(root, self.split)
        if self.count is not None and self.count > len(rows):
            raise UserError(
                f"{root} has {len(rows)} images, and count asks for the first {self.count}: leave it out, for all"
            )
        return rows

    def _source(self, *, class_per_image: bool) -> Source:
        """The images as squares, none decoded; `class_per_image`: each image is a class of its own."""
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
        """Raise UserError for other classes than expected. If classes have no names, the last may lack images."""
        root = rows.root
        if not self.is_counted:
            raise UserError(
                f"{root} was not there when the run was opened, so nobody counted its classes: open it again"
            )
        if not self.labels:
            return
        if labels is None:
            columns = f" (no column '{self.label}' among {', '.join(rows.columns())})" if rows.columns() else ""
            raise UserError(f"{root} has no labels{columns}, data.classes says {self.classes}: set data.classes=0")
        if self.names and labels.names != self.names:
            missing = sorted(set(self.names) - set(labels.names))
            added = sorted(set(labels.names) - set(self.names))
            changes: list[str] = []
            if missing:
                changes.append(f"without {first_few(missing, max_items=_MAX_NAMED)}")
            if added:
                changes.append(f"with {first_few(added, max_items=_MAX_NAMED)}")
            raise UserError(
                f"{root} has other classes than the run was made with, {'; '.join(changes) or 'in another order'}: "
                "name the folders as they were, or begin a new run"
            )
        if labels.count > self.labels or (labels.names and labels.count < self.labels):
            per_class = self.classes // self.labels
            captions = f" with {per_class} captions each" if self.captions else ""
            raise UserError(
                f"{root} has {labels.count} classes{captions}, data.classes says {self.classes}: set "
                f"data.classes={labels.count * per_class}"
            )


_FIELDS_OF_IMAGES = re.compile(rf"\bdata\.(?={'|'.join(Images.model_fields)})\b")  # in the text of an error


@contextmanager
def errors_of_latents() -> Generator[None]:
    """Name fields of images in errors by where a run of latents has them: `data.images.root` for `data.root`."""
    try:
        yield
    except UserError as error:
        raise UserError(with_fields_of_latents(str(error))) from error


def with_fields_of_latents(message: str) -> str:
    """A message on images, with the fields named by where a run of latents has them."""
    return _FIELDS_OF_IMAGES.sub("data.images.", message)
