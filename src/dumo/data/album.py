"""A finite set of images as a source: kept decoded where it is small, else decoded when asked for, a little ahead."""

import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dumo.data.augment import Edm
from dumo.data.epoch import mirrored, rows_of
from dumo.data.pixel import Frame, Unreadable
from dumo.data.store import Store
from dumo.io.picture import from_uint8
from dumo.random import stream
from dumo.types import UserError

PIECE = 32  # images that a thread decodes in one go
AHEAD = 2  # batches decoded ahead of the step
THREADS = min(16, os.cpu_count() or 1)

Pixels = UInt8[Tensor, "n c h w"]
Order = Int64[Tensor, " n"]


class Album:
    """Images in [-1, 1], each row in one place for good: batches, and whole stretches, are functions of row numbers.

    Of an image that cannot be read: `skip=False` raises UserError with its path. `skip=True` warns and leaves it out:
    for good where all are in memory; else whenever it is met, and in a batch the next one takes its place.
    """

    def __init__(
        self, store: Store, frame: Frame, *, flip: bool, skip: bool, memory: float, augment: Edm | None = None
    ) -> None:
        """Decode all, if it takes at most `memory` bytes."""
        self.store, self.frame, self.flip, self.augment, self.skip = store, frame, flip, augment, skip
        self.bad: dict[int, str] = {}  # which, and why, by number in the store
        self.told = 0  # how many of them have been warned of
        self.places = torch.arange(len(store))  # numbers in the store, by row
        self.kept: Pixels | None = None
        self.ahead: dict[tuple[int, int, int, range], Future[tuple[Tensor, Tensor]]] = {}
        if len(store) * frame.channels * frame.side**2 <= memory:
            self._keep()

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.places)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, where the data tell them."""
        return self.store.labels.names if self.store.labels else ()

    def __len__(self) -> int:
        return self.size

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Epoch after epoch, each in its own order, half of the images mirrored if `flip`; the next ones are begun.

        The second is the classes (rows,), or what was done to augmented images (rows, numbers). A function of its
        arguments alone.
        """
        mine = range(batch)[rows]
        if self.kept is not None and self.augment is None:
            return self._batch(step, batch, seed, mine)
        wanted = [(s, batch, seed, mine) for s in range(step, step + AHEAD + 1)]
        for key in set(self.ahead) - set(wanted):
            self.ahead.pop(key).cancel()
        for key in wanted:
            if key not in self.ahead:
                self.ahead[key] = self._conductor.submit(self._batch, *key)
        made = self.ahead.pop(wanted[0]).result()
        self._tell()
        return made

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Order:
        """Their numbers in the store; of an image that cannot be read, its own."""
        return self.places[rows_of(step, batch, size=self.size, seed=seed, rows=rows)]

    def fingerprint(self) -> str | None:
        """None: it is not known."""
        return None

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Every row, where all are in memory; else n of them, the i-th choice. Not mirrored."""
        if self.kept is not None or n >= self.size:
            return self.rows(slice(None))
        return self._whole(torch.randperm(self.size, generator=stream(seed, "reference", i))[:n])

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A stretch of the rows in their own order, not mirrored: to go through all once. Fewer where some are bad."""
        return self._whole(torch.arange(self.size)[rows])

    def path(self, row: int) -> str:
        """What to call the image in a row: its file, or its place in one."""
        return self.store.path(int(self.places[row]))

    def _batch(self, step: int, batch: int, seed: int, mine: range) -> tuple[Tensor, Tensor]:
        rows = slice(mine.start, mine.stop)
        pixels, c = self._full(rows_of(step, batch, size=self.size, seed=seed, rows=rows))
        if self.flip:
            turned = mirrored(step, batch, seed, rows)[:, None, None, None]
            pixels = torch.where(turned, pixels.flip(-1), pixels)
        x = from_uint8(pixels)
        if not self.augment:
            return x, c
        change = self.augment.drawn(batch, stream(seed, step, "augment"))[rows]
        return self.augment(x, change), change.told

    def _whole(self, rows: Order) -> tuple[Tensor, Tensor]:
        """The samples and classes of these rows, without those that cannot be read."""
        places = self.places[rows]
        if self.kept is not None:
            return from_uint8(self.kept[rows]), self._classes(places)
        pixels, bad = self._decode(places)
        self._tell()
        good = _others(len(places), bad)
        return from_uint8(pixels[good]), self._classes(places[good])

    def _full(self, rows: Order) -> tuple[Pixels, Order]:
        """The pixels and classes of as many rows, of the next ones where these cannot be read."""
        places = self.places[rows]
        if self.kept is not None:
            return self.kept[rows], self._classes(places)
        pixels, bad = self._decode(places)
        while bad:
            self._check_any()
            places[bad] = (places[bad] + 1) % len(self.store)
            again, still = self._decode(places[bad])
            pixels[bad], bad = again, [bad[k] for k in still]
        return pixels, self._classes(places)

    def _classes(self, places: Order) -> Order:
        return self.store.labels.c[places] if self.store.labels else torch.zeros(len(places), dtype=torch.long)

    def _keep(self) -> None:
        """Decode everything, once; what cannot be read is out."""
        pixels, bad = self._decode(self.places)
        self._pool.shutdown()
        self._check_any()
        if bad:
            good = _others(len(pixels), bad)
            pixels, self.places = pixels[good], self.places[good]
        self.kept = pixels
        self._tell()

    def _decode(self, places: Order) -> tuple[Pixels, list[int]]:
        """The images at some places of the store, and which of these, counted from 0, cannot be read."""
        pixels = torch.zeros(len(places), *self.frame.shape, dtype=torch.uint8)
        pieces = zip(places.split(PIECE), pixels.split(PIECE), strict=True)
        jobs = [self._pool.submit(self._piece, where.tolist(), into) for where, into in pieces]
        try:
            return pixels, [k * PIECE + i for k, job in enumerate(jobs) for i in job.result()]
        finally:
            for job in jobs:
                job.cancel()

    def _piece(self, places: list[int], into: Pixels) -> list[int]:
        bad: list[int] = []
        for i, place in enumerate(places):
            try:
                if place not in self.bad:
                    into[i] = self.frame(self.store.read(place))
                    continue
            except (OSError, ValueError) as error:
                what = f"{self.store.path(place)} {_said(error)}"
                if not self.skip:
                    raise UserError(f"{what}: {WAY_OUT}") from error
                self.bad[place] = what
            bad.append(i)
        return bad

    def _tell(self) -> None:
        """Warn of what could not be read since the last time, in one line."""
        if (count := len(self.bad)) > self.told:
            new, self.told = sorted(list(self.bad)[self.told :]), count
            names = "; ".join(self.bad[place] for place in new[:3])
            instead = "left out" if self.kept is not None else "left out, in a batch replaced by the next"
            warnings.warn(
                f"{count} of {len(self.store)} images cannot be read and are {instead}: {names}"
                + ("; ..." if len(new) > 3 else ""),
                stacklevel=3,
            )

    def _check_any(self) -> None:
        if len(self.bad) == len(self.store):
            raise UserError(f"none of the {len(self.store)} images can be read; the first: {self.bad[0]}")

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")

    @cached_property
    def _conductor(self) -> ThreadPoolExecutor:
        """Makes whole batches, one after the other, with the help of the pool."""
        return ThreadPoolExecutor(1, thread_name_prefix="ahead")


WAY_OUT = "mend or remove it, or leave such images out with data.on_bad=skip"


def _said(error: OSError | ValueError) -> str:
    """What is wrong, as it follows a name."""
    if isinstance(error, Unreadable):
        return str(error)
    return f"cannot be read: {(isinstance(error, OSError) and error.strerror) or error}"


def _others(n: int, bad: list[int]) -> Bool[Tensor, " n"]:
    """All of n but these."""
    good = torch.ones(n, dtype=torch.bool)
    good[bad] = False
    return good
