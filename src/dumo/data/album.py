"""A finite set of images as a source: kept decoded where it is small, else decoded when asked for."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from math import prod
from threading import Lock, Semaphore

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from dumo.data.augment import Edm
from dumo.data.pixel import Frame, Unreadable
from dumo.data.store import Store
from dumo.io.content import Hashes
from dumo.io.picture import from_uint8
from dumo.io.source import mirrored, rows_of
from dumo.runtime import signals
from dumo.runtime.progress import Tick, late
from dumo.runtime.random import stream
from dumo.types import UserError

HASH = "sha256"  # of a cache: the column of the images' hashes
PIECE = 32  # images, at most, that a thread decodes in one go: ours
TURNS = 4  # pieces of a batch for each thread, at least, so that none waits long for another: ours
THREADS = min(16, os.cpu_count() or 1)

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
        frame: Frame,
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
        self.store, self.frame, self.flip, self.augment, self.skip = store, frame, flip, augment, skip
        self.hashes = hashes or Hashes(store.within, store.path, store.read, store.labels and store.labels.c)
        self.classed = not numbered
        self.use(THREADS)
        self.bad: dict[int, str] = {}  # which, and why, by number in the store
        self.warned, self.warning = 0, Lock()  # how many of them have been warned of
        self.places = only  # numbers in the store, by row; None: they are the same
        self.whole = self.size  # with those that cannot be read
        self.kept: Pixels | None = None
        if self.whole * prod(frame.shape) <= memory:
            self._keep()

    def use(self, threads: int) -> None:
        """Decode `threads` images at a time, of all batches together."""
        self.threads, self.turn = threads, Semaphore(threads)

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.store) if self.places is None else len(self.places)

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
        pixels, c = self._full(rows_of(step, batch, size=self.size, seed=seed, rows=rows))
        self._tell()
        if self.flip:
            turned = mirrored(step, batch, seed, rows)[:, None, None, None]
            pixels = torch.where(turned, pixels.flip(-1), pixels)
        x = from_uint8(pixels)
        if not self.augment:
            return x, c
        change = self.augment.drawn(batch, stream(seed, step, "augment"))[rows]
        return self.augment(x, change), change.numbers

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Order:
        """Their numbers in the store; of an image that cannot be read, its own."""
        return self.numbered(rows_of(step, batch, size=self.size, seed=seed, rows=rows))

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Every row, where all are in memory; else n of them, the i-th choice. Not mirrored."""
        if self.kept is not None or n >= self.size:
            return self.rows(slice(None))
        return self._whole(torch.randperm(self.size, generator=stream(seed, "reference", i))[:n])

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A stretch of the rows in their own order, not mirrored: to go through all once. Fewer where some are bad."""
        return self._whole(torch.arange(self.size)[rows])

    def numbered(self, rows: Order) -> Order:
        """Their numbers in the store: others than the rows' own where images were left out."""
        return rows if self.places is None else self.places[rows]

    def origins(self, rows: range) -> dict[str, Tensor]:
        """The numbers (n,) and hashes (n, 32) of the images that `rows` gave for a stretch of them."""
        places = [i for i in self.numbered(torch.tensor(rows)).tolist() if i not in self.bad]
        return {"image": torch.tensor(places), HASH: torch.from_numpy(self.hashes.known[places])}

    def fingerprint(self) -> str:
        """Of the store."""
        return self.store.fingerprint()

    def _whole(self, rows: Order) -> tuple[Tensor, Tensor]:
        """The samples and classes of these rows, without those that cannot be read."""
        places = self.numbered(rows)
        if self.kept is not None:
            return from_uint8(self.kept[rows]), self._classes(places)
        pixels, bad = self._decode(places)
        self._tell()
        good = _others(len(places), bad)
        return from_uint8(pixels[good]), self._classes(places[good])

    def _full(self, rows: Order) -> tuple[Pixels, Order]:
        """The pixels and classes of as many rows, of the next ones where these cannot be read."""
        if self.kept is not None:
            return self.kept[rows], self._classes(self.numbered(rows))
        pixels, bad = self._decode(self.numbered(rows))
        while bad:
            self._check_any()
            rows[bad] = (rows[bad] + 1) % self.size
            again, still = self._decode(self.numbered(rows[bad]))
            pixels[bad], bad = again, [bad[k] for k in still]
        return pixels, self._classes(self.numbered(rows))

    def _classes(self, places: Order) -> Order:
        if not self.classed:
            return places
        return self.store.labels.c[places] if self.store.labels else torch.zeros(len(places), dtype=torch.long)

    def _keep(self) -> None:
        """Decode everything, once; what cannot be read is out."""
        with late("decoding images", self.whole) as shown:

            def tick(done: int, note: str) -> None:
                signals.check()
                shown(done, note)

            places = self.numbered(torch.arange(self.whole))
            pixels, bad = self._decode(places, tick)
        self._check_any()
        if bad:
            good = _others(len(pixels), bad)
            pixels, self.places = pixels[good], places[good]
        self.kept = pixels
        self._tell()

    def _decode(self, places: Order, tick: Tick = lambda done, note: None) -> tuple[Pixels, list[int]]:
        """The images at some places of the store, and which of these, counted from 0, cannot be read."""
        pixels, bad = torch.zeros(len(places), *self.frame.shape, dtype=torch.uint8), list[int]()
        size = max(1, min(PIECE, len(places) // (TURNS * self.threads)))
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")  # a ms for each batch, and none is left
        pieces = zip(places.split(size), pixels.split(size), strict=True)
        try:
            jobs = [pool.submit(self._piece, where.tolist(), into) for where, into in pieces]
            for first, job in zip(range(0, len(places), size), jobs, strict=True):
                bad += [first + i for i in job.result()]
                tick(min(first + size, len(places)), "")
        finally:
            pool.shutdown(cancel_futures=True)
        self.hashes.rest()
        return pixels, bad

    def _piece(self, places: list[int], into: Pixels) -> list[int]:
        bad: list[int] = []
        for i, place in enumerate(places):
            with self.turn:
                if place in self.bad or not self._read(place, into[i]):
                    bad.append(i)
        return bad

    def _read(self, place: int, into: UInt8[Tensor, "c h w"]) -> bool:
        """Read, hash and decode an image; whether that could be done, or may not fail."""
        data = None
        try:
            data = self.store.read(place)
            into[:] = self.frame(data)
        except (OSError, ValueError) as error:
            what = f"{self.store.path(place)} {fault(error)}"
            if not self.skip:
                raise UserError(f"{what}: {WAY_OUT}") from error
            self.bad[place] = what
        if data is not None:
            self.hashes.see(place, data)
        return place not in self.bad

    def _tell(self) -> None:
        """Warn of what could not be read since the last time, in one line."""
        with self.warning:
            count, before = len(self.bad), self.warned
            new, self.warned = sorted(list(self.bad)[before:count]), count
        if new:
            names = "; ".join(self.bad[place] for place in new[:3])
            instead = "left out" if self.kept is not None else "left out, in a batch replaced by the next"
            warnings.warn(
                f"{count} of {self.whole} images cannot be read and are {instead}: {names}"
                + ("; ..." if len(new) > 3 else ""),
                stacklevel=3,
            )

    def _check_any(self) -> None:
        if len(self.bad) == self.whole:
            raise UserError(f"none of the {self.whole} images can be read; the first: {self.bad[min(self.bad)]}")


WAY_OUT = "mend or remove it, or leave such images out with data.on_bad=skip"


def fault(error: Exception) -> str:
    """Why an image cannot be read."""
    why = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return str(error) if isinstance(error, Unreadable) else why


def _others(n: int, bad: list[int]) -> Bool[Tensor, " n"]:
    """All of n but these."""
    good = torch.ones(n, dtype=torch.bool)
    good[bad] = False
    return good
