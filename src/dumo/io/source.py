"""Data sets in use: batches to train on, a reference to compare samples with, images in order.

- `Data`, `DataSource` and `Finite` are what evaluation, training and encoding ask of them.
- `TensorData`, `HeldOutSplit`, `Endless` and `Bucketed` are data in memory, data with rows held out, drawn data, and
  data in several shapes. Images and latents have sources of their own (`dumo.data`).
- `hashes_of` gives the hashes of a source's items, where they are files.
- `rows_of` and `mirrored` say which rows a step has, and which of its images are mirrored.

A batch is a function of the step, the batch size, the seed and the rows alone: so a run resumes by its step number, and
each rank reads its own rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dumo.io import digest
from dumo.runtime.random import keyed, stream
from dumo.types import Cond, Sample
from dumo.types.family import is_instance_of

if TYPE_CHECKING:
    from dumo.io.content import Hashes

CACHED_ORDERS = 2  # of epochs: batches are made ahead across the end of an epoch. Ours
_LOCK = Lock()  # a cache alone would let two threads make one order each


@runtime_checkable
class Data(Protocol):
    """Samples x (n, *shape), images in [-1, 1], with class indices c (n,), all zero where there are no classes."""

    @property
    def size(self) -> int | None:
        """The number of samples; None where they never end."""
        ...

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """The samples x and c to compare with: all or n of a finite set, else n fresh draws; the i-th choice."""
        ...


@runtime_checkable
class DataSource(Data, Protocol):
    """Data to train on."""

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The samples x and c of the rows `rows` of a step's global batch of `batch` rows.

        No other rows are read, decoded or drawn. A function of its arguments alone, that several threads may call at
        once.
        """
        ...

    def fingerprint(self) -> str | None:
        """A short text that changes where samples are added, removed, renamed or replaced; decodes nothing.

        None where samples never end.
        """
        ...

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """The numbers in the data set of a step's rows, (b,); None where it never ends."""
        ...


@runtime_checkable
class Finite(Protocol):
    """A finite set of images that can be read in order, each once."""

    def __len__(self) -> int: ...

    def rows(self, rows: slice, /) -> tuple[Tensor, Tensor]:
        """Some images, uint8 or in [-1, 1], with their classes; fewer where some cannot be read."""
        ...


@dataclass(frozen=True)
class TensorData:
    """A finite data set in memory."""

    x: Tensor
    c: Tensor

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.x)

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The rows of a step: epoch after epoch, each in its own order."""
        numbers = self.numbers(step, batch, seed, rows)
        return self.x[numbers], self.c[numbers]

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"]:
        """The numbers of a step's rows, (b,)."""
        return rows_of(step, batch, size=self.size, seed=seed, rows=rows)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """All samples; n, seed and i do not matter."""
        return self.x, self.c

    def fingerprint(self) -> str:
        """A digest of all samples and classes."""
        return digest.short(digest.of_tensor(self.x), digest.of_tensor(self.c))


@dataclass(frozen=True)
class HeldOutSplit(TensorData):
    """The rows of a data set that are trained on, with the rows that are held out."""

    full: TensorData  # all rows
    held_out: TensorData

    @classmethod
    def of(cls, full: TensorData, held: Int64[Tensor, " k"]) -> "HeldOutSplit":
        """Hold out the rows with the numbers `held`."""
        is_trained = torch.ones(full.size, dtype=torch.bool)
        is_trained[held] = False
        held_out = TensorData(full.x[held], full.c[held])
        return cls(full.x[is_trained], full.c[is_trained], full, held_out)


@dataclass(frozen=True)
class Endless:
    """A data set that is drawn: `sample_map` makes samples and classes of normal numbers (b, width).

    For a row to be equal in any batch, it must be made of its own numbers alone, by operations that are rounded once,
    as sums, products, quotients and roots are: what torch rounds otherwise may depend on the place in the batch.
    """

    sample_map: Callable[[Sample], tuple[Sample, Cond]]
    width: int  # normal numbers to a row
    size: None = None

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Fresh i.i.d. draws, keyed by (seed, step, row)."""
        return self.sample_map(keyed(seed, step, "data", rows=range(batch)[rows], shape=[self.width]))

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> None:
        """None: no row comes twice."""

    def fingerprint(self) -> None:
        """None: the run's spec says what the samples are."""

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """The i-th choice of n fresh i.i.d. draws that are in no batch."""
        return self.sample_map(keyed(seed, "reference", i, rows=range(n), shape=[self.width]))


@dataclass(frozen=True)
class Bucketed:
    """Samples of several shapes, each batch of one shape: a source without state.

    A part of n rows goes through them epoch after epoch, and makes a batch whenever it has the rows for one: by the end
    of epoch e that is floor(e n / batch) batches. What is left over begins the next one, so a part of less than a batch
    makes one every few epochs, and no row is lost. Over all parts, epoch e begins at step

        S(e) = sum_k floor(e n_k / batch),

    and its batches come in an order of their own, keyed by the seed.
    """

    parts: Sequence[DataSource]  # one for each shape; finite, none is empty
    shapes: Sequence[tuple[int, ...]]  # of a sample of each part
    about: str = ""  # the parts in words

    @property
    def size(self) -> int:
        """The number of rows of all parts."""
        return sum(self.counts)

    @property
    def counts(self) -> list[int]:
        """The number of rows of each part."""
        return [part.size or 0 for part in self.parts]

    @property
    def hashes(self) -> object:
        """The hashes of the images, which the parts share."""
        return getattr(self.parts[0], "hashes", None)

    @property
    def origin(self) -> object:
        """The images that latents were made of, which the parts share."""
        return getattr(self.parts[0], "origin", None)

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The samples x and c of a step's rows, all of one part."""
        k, number = self.turn(step, batch, seed)
        return self.parts[k].batch(number, batch, self.seed(seed, k), rows)

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """The numbers in the data set of a step's rows, (b,)."""
        k, number = self.turn(step, batch, seed)
        return self.parts[k].numbers(number, batch, self.seed(seed, k), rows)

    def seed(self, seed: int, k: int) -> int:
        """The seed of part k."""
        return stream(seed, "part", k).initial_seed()

    def shape(self, step: int, batch: int, seed: int) -> tuple[int, ...]:
        """The shape of a step's samples."""
        k, _ = self.turn(step, batch, seed)
        return self.shapes[k]

    def turn(self, step: int, batch: int, seed: int) -> tuple[int, int]:
        """The part whose turn it is at a step, and the number of that batch among the part's own."""
        counts = self.counts

        def batches_before(epoch: int) -> list[int]:
            return [epoch * n // batch for n in counts]

        epoch = step * batch // sum(counts)  # S(epoch) is at most step
        while sum(batches_before(epoch + 1)) <= step:
            epoch += 1
        first = batches_before(epoch)
        end = batches_before(epoch + 1)
        order = torch.randperm(sum(end) - sum(first), generator=stream(seed, "turns", epoch))
        position = int(order[step - sum(first)])  # among the epoch's batches, part after part
        for k, (part_first, part_end) in enumerate(zip(first, end, strict=True)):
            if position < part_end - part_first:
                return k, part_first + position
            position -= part_end - part_first
        raise AssertionError("an epoch has no other batches than those of its parts")

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """The reference of the largest part."""
        return self.parts[self.counts.index(max(self.counts))].reference(n, seed, i)

    def fingerprint(self) -> str | None:
        """The fingerprint of the data set, which each part has."""
        return self.parts[0].fingerprint()


def hashes_of(source: object) -> "Hashes | None":
    """The hashes of a source of images; None for a source whose samples are no files."""
    hashes = getattr(source, "hashes", None)
    return hashes if is_instance_of(hashes, "dumo.io.content:Hashes") else None


def rows_of(step: int, batch: int, *, size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"]:
    """The numbers (b,), below `size`, of the rows at the places `rows` in a step's global batch.

    Each epoch is one permutation, keyed by the seed; epochs follow one another without a gap.
    """
    position = torch.arange(step * batch, (step + 1) * batch)[rows]
    epoch = position // size
    numbers = torch.empty_like(position)
    for e in epoch.unique().tolist():
        in_epoch = epoch == e
        numbers[in_epoch] = _order(size, seed, e)[position[in_epoch] % size]
    return numbers


def mirrored(step: int, batch: int, seed: int, rows: slice = slice(None)) -> Bool[Tensor, " b"]:
    """Which of the rows `rows` of a step's global batch are mirrored: each with probability 1/2."""
    return (torch.rand(batch, generator=stream(seed, step, "flip")) < 0.5)[rows]


def _order(size: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """The order of an epoch's rows, made once: for millions of rows that takes longer than a step."""
    with _LOCK:
        return _permuted(size, seed, epoch)


@lru_cache(CACHED_ORDERS)
def _permuted(size: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """A permutation of the numbers below `size`, keyed by the seed and the epoch."""
    return torch.randperm(size, generator=stream(seed, "epoch", epoch))
