"""A finite set of images as a source: kept decoded where it is small, else decoded when asked for.

`Album` offers images in three ways: `batch` for a training step, `reference` to compare samples with, and `rows` to go
through all once. For a batch it

1. chooses the rows of the step (`dumo.io.source.rows_of`);
2. reads and decodes their images on threads, and hashes each that is read (`dumo.io.content`). An image that cannot be
   read is refused, or replaced by the next;
3. mirrors or augments them.
"""

import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from threading import Lock, Semaphore

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dumo.data.augment import Edm
from dumo.data.pixel import ToRectangle, Unreadable
from dumo.data.store import Store, store_hashes
from dumo.io.content import Hashes
from dumo.io.picture import from_uint8
from dumo.io.source import mirrored_rows, rows_of
from dumo.io.suffix import UNREADABLE_SUFFIXES
from dumo.runtime import signals
from dumo.runtime.progress import Tick, bar
from dumo.runtime.random import stream
from dumo.runtime.threads import cores
from dumo.types import UserError

HASH_COLUMN = "sha256"  # in a cache of latents: the column of the images' hashes
_MAX_CHUNK_IMAGES = 32  # that a thread decodes in one go: ours
_CHUNKS_PER_THREAD = 4  # of a batch, at least, so that no thread waits long for another: ours
MAX_THREADS = min(16, cores())  # that decode at once: ours
_MAX_NAMED = 3  # unreadable images that a warning names: ours
UNREADABLE_FIX = "mend or remove it, or leave such images out with data.on_bad=skip"

Pixels = UInt8[Tensor, "n c h w"]
Numbers = Int64[Tensor, " n"]  # of rows, of images in a store, or of classes


class Album:
    """The images of a store, or some of them, in [-1, 1]. Rows have a fixed order.

    For an image that cannot be read, `skip=False` raises UserError with its path. `skip=True` warns and leaves it out:
    for good where all images are in memory; else whenever it is met, and in a batch the next image takes its place.
    """

    def __init__(
        self,
        store: Store,
        to_pixels: ToRectangle,
        *,
        flip: bool,
        skip: bool,
        memory: float,
        augment: Edm | None = None,
        class_per_image: bool = False,
        store_numbers: Numbers | None = None,
        hashes: Hashes | None = None,
    ) -> None:
        """Decode all images now if their pixels take at most `memory` bytes, else when they are asked for.

        `flip`: mirror half of the images of a batch. `class_per_image`: each image is a class of its own.
        `store_numbers`: the numbers in the store of the images to offer; None: all. `hashes`: those of the store; None:
        look them up.
        """
        self.store = store
        self.to_pixels = to_pixels
        self.flip = flip
        self.augment = augment
        self.skip = skip
        self.hashes = hashes or store_hashes(store)
        self.has_classes = not class_per_image
        self.use_threads(MAX_THREADS)
        self.unreadable: dict[int, str] = {}  # why an image cannot be read, by its number in the store
        self.num_warned = 0  # images in `unreadable` that were warned of
        self._warning_lock = Lock()
        self.numbers_in_store = store_numbers  # by row; None: both are the same
        self.full_size = self.size  # with images that cannot be read
        self.decoded: Pixels | None = None  # all rows; None: they are decoded when asked for
        if self.full_size * prod(to_pixels.shape) <= memory:
            self._decode_all()

    def use_threads(self, threads: int) -> None:
        """Decode `threads` images at a time, of all batches together."""
        self.threads = threads
        self._slots = Semaphore(threads)

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.store) if self.numbers_in_store is None else len(self.numbers_in_store)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, where the data have them."""
        return self.store.labels.names if self.store.labels else ()

    def __len__(self) -> int:
        return self.size

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Some rows of a step's batch: images (b, 3, h, w), with their classes (b,), or with augment labels (b, n).

        Epoch follows epoch, each in its own order; half of the images are mirrored if `flip`. A function of its
        arguments alone.
        """
        drawn_rows = rows_of(step, batch_size, size=self.size, seed=seed, rows=rows)
        pixels, c = self._read_with_replacements(drawn_rows)
        self.warn_of_unreadable("left out, in a batch replaced by the next", min_growth=2)
        if self.flip:
            flipped = mirrored_rows(step, batch_size, seed, rows)[:, None, None, None]
            pixels = torch.where(flipped, pixels.flip(-1), pixels)
        x = from_uint8(pixels)
        if not self.augment:
            return x, c
        augmentation = self.augment.draw(batch_size, stream(seed, step, "augment"))[rows]
        return self.augment(x, augmentation), augmentation.augment_labels

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Numbers:
        """The numbers in the store of a step's rows, (b,), also of images that cannot be read."""
        return self.store_numbers(rows_of(step, batch_size, size=self.size, seed=seed, rows=rows))

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """All images where they are in memory, else the i-th choice of n; with their classes, not mirrored."""
        if self.decoded is not None or n >= self.size:
            return self.rows(slice(None))
        chosen_rows = torch.randperm(self.size, generator=stream(seed, "reference", i))[:n]
        return self._read_readable(chosen_rows)

    def rows(self, rows: slice | Numbers) -> tuple[Tensor, Tensor]:
        """Some rows in their own order, with their classes, not mirrored; without images that cannot be read."""
        return self._read_readable(torch.arange(self.size)[rows])

    def store_numbers(self, rows: Numbers) -> Numbers:
        """The numbers in the store of some rows, (n,)."""
        return rows if self.numbers_in_store is None else self.numbers_in_store[rows]

    def origins(self, rows: range) -> dict[str, Tensor]:
        """The numbers (n,) and hashes (n, 32) of the images that `Album.rows` gave for a range of rows."""
        readable = [
            number for number in self.store_numbers(torch.tensor(rows)).tolist() if number not in self.unreadable
        ]
        return {"image": torch.tensor(readable), HASH_COLUMN: torch.from_numpy(self.hashes.sha256[readable])}

    def readable_labels(self) -> Numbers | None:
        """The classes of the images that can be read; None where that is all, or not known yet, or each is a class."""
        if self.decoded is None or not self.unreadable or not self.has_classes:
            return None
        return self._classes(self.store_numbers(torch.arange(self.size)))

    def fingerprint(self) -> str:
        """The store's fingerprint."""
        return self.store.fingerprint()

    def _read_readable(self, rows: Numbers) -> tuple[Tensor, Tensor]:
        """The samples and classes of some rows, without images that cannot be read."""
        numbers = self.store_numbers(rows)
        if self.decoded is not None:
            return from_uint8(self.decoded[rows]), self._classes(numbers)
        pixels, bad = self._decode(numbers)
        self.warn_of_unreadable(min_growth=2)
        good = _all_but(len(numbers), bad)
        return from_uint8(pixels[good]), self._classes(numbers[good])

    def _read_with_replacements(self, rows: Numbers) -> tuple[Pixels, Numbers]:
        """The pixels and classes of some rows; an image that cannot be read is replaced by the next that can."""
        if self.decoded is not None:
            return self.decoded[rows], self._classes(self.store_numbers(rows))
        replaced_rows = rows.clone()
        pixels, bad = self._decode(self.store_numbers(replaced_rows))
        while bad:
            self._require_any_readable()
            replaced_rows[bad] = (replaced_rows[bad] + 1) % self.size
            next_pixels, still_bad = self._decode(self.store_numbers(replaced_rows[bad]))
            pixels[bad] = next_pixels
            bad = [bad[k] for k in still_bad]
        return pixels, self._classes(self.store_numbers(replaced_rows))

    def _classes(self, numbers: Numbers) -> Numbers:
        """The classes of images, by their numbers in the store."""
        if not self.has_classes:
            return numbers
        if self.store.labels is None:
            return torch.zeros(len(numbers), dtype=torch.long)
        return self.store.labels.c[numbers]

    def _decode_all(self) -> None:
        """Decode all images into `decoded`, and leave out those that cannot be read."""
        with bar("decoding images", self.full_size) as show:

            def tick(done: int, note: str) -> None:
                signals.check()
                show(done, note)

            numbers = self.store_numbers(torch.arange(self.full_size))
            pixels, bad = self._decode(numbers, tick)
        self._require_any_readable()
        if bad:
            good = _all_but(len(pixels), bad)
            pixels = pixels[good]
            self.numbers_in_store = numbers[good]
        self.decoded = pixels
        self.warn_of_unreadable()

    def _decode(self, numbers: Numbers, tick: Tick = lambda done, note: None) -> tuple[Pixels, list[int]]:
        """The pixels of images, by their numbers in the store, and the indices of those that cannot be read."""
        pixels = torch.zeros(len(numbers), *self.to_pixels.shape, dtype=torch.uint8)
        bad: list[int] = []
        chunk_images = max(1, min(_MAX_CHUNK_IMAGES, len(numbers) // (_CHUNKS_PER_THREAD * self.threads)))
        chunks = zip(numbers.split(chunk_images), pixels.split(chunk_images), strict=True)
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")  # takes a ms for each batch; none is left
        try:
            jobs = [pool.submit(self._decode_chunk, chunk.tolist(), into) for chunk, into in chunks]
            for first, job in zip(range(0, len(numbers), chunk_images), jobs, strict=True):
                bad += [first + i for i in job.result()]
                tick(min(first + chunk_images, len(numbers)), "")
        finally:
            pool.shutdown(cancel_futures=True)
        self.hashes.save_if_due()
        return pixels, bad

    def _decode_chunk(self, numbers: list[int], into: Pixels) -> list[int]:
        """Decode images into `into`. Returns the indices of those that cannot be read."""
        bad: list[int] = []
        for i, number in enumerate(numbers):
            with self._slots:
                if number in self.unreadable or not self._decode_image(number, into[i]):
                    bad.append(i)
        return bad

    def _decode_image(self, number: int, into: UInt8[Tensor, "c h w"]) -> bool:
        """Read, hash and decode an image. Returns whether it can be read; raises UserError if not, unless `skip`."""
        data = None
        try:
            data = self.store.read(number)
            into[:] = self.to_pixels(data)
        except (OSError, ValueError) as error:
            message = unreadable_text(self.store.path(number), error)
            if not self.skip:
                raise UserError(f"{message}: {UNREADABLE_FIX}") from error
            self.unreadable[number] = message
        if data is not None:
            self.hashes.check_item(number, data)
        return number not in self.unreadable

    def warn_of_unreadable(self, fate: str = "left out", *, min_growth: int = 1) -> None:
        """Warn of images that could not be read since the last warning, in one line, with what becomes of them.

        Nothing is said until they are `min_growth` times as many as at that warning, so that batches give few lines.
        """
        with self._warning_lock:
            num_bad = len(self.unreadable)
            if num_bad < min_growth * self.num_warned:
                return
            unreported = sorted(list(self.unreadable)[self.num_warned : num_bad])
            self.num_warned = num_bad
        if not unreported:
            return
        examples = "; ".join(self.unreadable[number] for number in unreported[:_MAX_NAMED])
        if len(unreported) > _MAX_NAMED:
            examples += "; ..."
        warnings.warn(
            f"{num_bad} of {self.full_size} images cannot be read and are {fate}: {examples}",
            stacklevel=3,
        )

    def _require_any_readable(self) -> None:
        """Raise UserError where no image can be read."""
        if len(self.unreadable) == self.full_size:
            raise UserError(f"none of the {self.full_size} images can be read{first_unreadable(self.unreadable)}")


def unreadable_text(path: str, error: Exception) -> str:
    """Which image cannot be read, and why; with a way out for the formats of telephones."""
    reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if isinstance(error, Unreadable):
        reason = str(error)
    if os.path.splitext(path)[1].lower() in UNREADABLE_SUFFIXES:
        reason += "; convert it to JPEG or PNG"
    return f"{path} {reason}"


def first_unreadable(unreadable: Mapping[int, str]) -> str:
    """The end of a message that no image can be read: the first of them, and why; "" where that is not known."""
    return f"; the first: {unreadable[min(unreadable)]}" if unreadable else ""


def _all_but(n: int, bad: list[int]) -> Bool[Tensor, " n"]:
    """Which of n images are not among the bad ones, given by their indices."""
    good = torch.ones(n, dtype=torch.bool)
    good[bad] = False
    return good
