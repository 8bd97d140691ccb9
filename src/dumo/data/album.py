"""A finite set of images as a source: kept decoded where it is small, else decoded when asked for.

`Album.batch` draws rows for a step, reads and decodes their images on threads, mirrors or augments them. Images that
cannot be read are refused or replaced. Every image that is read is hashed on the way (`dumo.io.content`).
"""

import os
import warnings
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
from dumo.io.source import mirrored, rows_of
from dumo.runtime import signals
from dumo.runtime.progress import Tick, late
from dumo.runtime.random import stream
from dumo.types import UserError

HASH = "sha256"  # of a cache: the column of the images' hashes
MAX_CHUNK = 32  # images that a thread decodes in one go: ours
CHUNKS_PER_THREAD = 4  # of a batch, at least, so that no thread waits long for another: ours
THREADS = min(16, os.cpu_count() or 1)
HOW_TO_MEND = "mend or remove it, or leave such images out with data.on_bad=skip"

Pixels = UInt8[Tensor, "n c h w"]
Order = Int64[Tensor, " n"]


class Album:
    """Images in [-1, 1], each row in one place for good: batches, and whole stretches, are functions of row numbers.

    Of an image that cannot be read: `skip=False` raises UserError with its path. `skip=True` warns and leaves it out:
    for good where all are in memory; else whenever it is met, and in a batch the next one takes its place.
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
        numbered: bool = False,
        only: Order | None = None,
        hashes: Hashes | None = None,
    ) -> None:
        """Decode all, if it takes at most `memory` bytes.

        `numbered`: each image is a class of its own. `only`: the numbers of those in the store that are meant; `hashes`
        of the store, if they are there already.
        """
        self.store = store
        self.to_pixels = to_pixels
        self.flip = flip
        self.augment = augment
        self.skip = skip
        self.hashes = hashes or store_hashes(store)
        self.has_classes = not numbered
        self.use(THREADS)
        self.bad: dict[int, str] = {}  # which cannot be read, and why, by number in the store
        self.num_warned = 0  # of those in `bad`
        self.warning = Lock()
        self.numbers_of_rows = only  # in the store; None: they are the rows' own
        self.full_size = self.size  # with those that cannot be read
        self.kept: Pixels | None = None
        if self.full_size * prod(to_pixels.shape) <= memory:
            self._keep()

    def use(self, threads: int) -> None:
        """Decode `threads` images at a time, of all batches together."""
        self.threads = threads
        self.decoding = Semaphore(threads)

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.store) if self.numbers_of_rows is None else len(self.numbers_of_rows)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, where the data have them."""
        return self.store.labels.names if self.store.labels else ()

    def __len__(self) -> int:
        return self.size

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Epoch after epoch, each in its own order, half of the images mirrored if `flip`.

        The second is the classes (rows,), or what was done to augmented images (rows, numbers). A function of its
        arguments alone.
        """
        drawn_rows = rows_of(step, batch, size=self.size, seed=seed, rows=rows)
        pixels, c = self._read_all(drawn_rows)
        self._warn()
        if self.flip:
            flipped = mirrored(step, batch, seed, rows)[:, None, None, None]
            pixels = torch.where(flipped, pixels.flip(-1), pixels)
        x = from_uint8(pixels)
        if not self.augment:
            return x, c
        augmentation = self.augment.drawn(batch, stream(seed, step, "augment"))[rows]
        return self.augment(x, augmentation), augmentation.numbers

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Order:
        """Their numbers in the store; of an image that cannot be read, its own."""
        return self.numbered(rows_of(step, batch, size=self.size, seed=seed, rows=rows))

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Every row, where all are in memory; else n of them, the i-th choice. Not mirrored."""
        if self.kept is not None or n >= self.size:
            return self.rows(slice(None))
        chosen = torch.randperm(self.size, generator=stream(seed, "reference", i))[:n]
        return self._read_readable(chosen)

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A stretch of the rows in their own order, not mirrored: to go through all once. Fewer where some are bad."""
        return self._read_readable(torch.arange(self.size)[rows])

    def numbered(self, rows: Order) -> Order:
        """Their numbers in the store: others than the rows' own where images were left out."""
        return rows if self.numbers_of_rows is None else self.numbers_of_rows[rows]

    def origins(self, rows: range) -> dict[str, Tensor]:
        """The numbers (n,) and hashes (n, 32) of the images that `rows` gave for a stretch of them."""
        readable = [number for number in self.numbered(torch.tensor(rows)).tolist() if number not in self.bad]
        return {"image": torch.tensor(readable), HASH: torch.from_numpy(self.hashes.sha256[readable])}

    def fingerprint(self) -> str:
        """Of the store."""
        return self.store.fingerprint()

    def _read_readable(self, rows: Order) -> tuple[Tensor, Tensor]:
        """The samples and classes of these rows, without those that cannot be read."""
        numbers = self.numbered(rows)
        if self.kept is not None:
            return from_uint8(self.kept[rows]), self._classes(numbers)
        pixels, bad = self._decode(numbers)
        self._warn()
        good = _all_but(len(numbers), bad)
        return from_uint8(pixels[good]), self._classes(numbers[good])

    def _read_all(self, rows: Order) -> tuple[Pixels, Order]:
        """The pixels and classes of as many rows, of the next ones where these cannot be read."""
        if self.kept is not None:
            return self.kept[rows], self._classes(self.numbered(rows))
        pixels, bad = self._decode(self.numbered(rows))
        while bad:
            self._require_any()
            rows[bad] = (rows[bad] + 1) % self.size
            next_pixels, still_bad = self._decode(self.numbered(rows[bad]))
            pixels[bad] = next_pixels
            bad = [bad[k] for k in still_bad]
        return pixels, self._classes(self.numbered(rows))

    def _classes(self, numbers: Order) -> Order:
        if not self.has_classes:
            return numbers
        if self.store.labels is None:
            return torch.zeros(len(numbers), dtype=torch.long)
        return self.store.labels.c[numbers]

    def _keep(self) -> None:
        """Decode everything, once; what cannot be read is out."""
        with late("decoding images", self.full_size) as show:

            def tick(done: int, note: str) -> None:
                signals.check()
                show(done, note)

            numbers = self.numbered(torch.arange(self.full_size))
            pixels, bad = self._decode(numbers, tick)
        self._require_any()
        if bad:
            good = _all_but(len(pixels), bad)
            pixels = pixels[good]
            self.numbers_of_rows = numbers[good]
        self.kept = pixels
        self._warn()

    def _decode(self, numbers: Order, tick: Tick = lambda done, note: None) -> tuple[Pixels, list[int]]:
        """Some images of the store, by their numbers, and which of these, counted from 0, cannot be read."""
        pixels = torch.zeros(len(numbers), *self.to_pixels.shape, dtype=torch.uint8)
        bad: list[int] = []
        size = max(1, min(MAX_CHUNK, len(numbers) // (CHUNKS_PER_THREAD * self.threads)))
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")  # a ms for each batch, and none is left
        chunks = zip(numbers.split(size), pixels.split(size), strict=True)
        try:
            jobs = [pool.submit(self._decode_chunk, chunk.tolist(), into) for chunk, into in chunks]
            for first, job in zip(range(0, len(numbers), size), jobs, strict=True):
                bad += [first + i for i in job.result()]
                tick(min(first + size, len(numbers)), "")
        finally:
            pool.shutdown(cancel_futures=True)
        self.hashes.save_if_due()
        return pixels, bad

    def _decode_chunk(self, numbers: list[int], into: Pixels) -> list[int]:
        """Decode images into `into`; return which of them, counted from 0, cannot be read."""
        bad: list[int] = []
        for i, number in enumerate(numbers):
            with self.decoding:
                if number in self.bad or not self._decode_image(number, into[i]):
                    bad.append(i)
        return bad

    def _decode_image(self, number: int, into: UInt8[Tensor, "c h w"]) -> bool:
        """Read, hash and decode an image; whether it can be read. Raises UserError where it may not fail."""
        data = None
        try:
            data = self.store.read(number)
            into[:] = self.to_pixels(data)
        except (OSError, ValueError) as error:
            message = f"{self.store.path(number)} {fault(error)}"
            if not self.skip:
                raise UserError(f"{message}: {HOW_TO_MEND}") from error
            self.bad[number] = message
        if data is not None:
            self.hashes.see(number, data)
        return number not in self.bad

    def _warn(self) -> None:
        """Warn of what could not be read since the last time, in one line."""
        with self.warning:
            count = len(self.bad)
            new = sorted(list(self.bad)[self.num_warned : count])
            self.num_warned = count
        if not new:
            return
        fate = "left out" if self.kept is not None else "left out, in a batch replaced by the next"
        examples = "; ".join(self.bad[number] for number in new[:3])
        if len(new) > 3:
            examples += "; ..."
        warnings.warn(
            f"{count} of {self.full_size} images cannot be read and are {fate}: {examples}",
            stacklevel=3,
        )

    def _require_any(self) -> None:
        """Raise UserError where no image can be read."""
        if len(self.bad) == self.full_size:
            raise UserError(f"none of the {self.full_size} images can be read; the first: {self.bad[min(self.bad)]}")


def fault(error: Exception) -> str:
    """Why an image cannot be read."""
    if isinstance(error, Unreadable):
        return str(error)
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _all_but(n: int, bad: list[int]) -> Bool[Tensor, " n"]:
    """All of n but these."""
    good = torch.ones(n, dtype=torch.bool)
    good[bad] = False
    return good
