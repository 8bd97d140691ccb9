"""Data sources: batches for training, reference samples for evaluation, and images in order.

- Protocols: `Data` for evaluation, `DataSource` for training, `Finite` for encoding. Users implement `DataSource`, so
  its methods keep their names.
- Sources: `TensorData` is in memory, `HeldOutSplit` holds out rows, `Endless` generates samples, `Bucketed` has several
  shapes. The sources of images and latents are in `dumo.data`.
- Helpers: `rows_of` returns the rows of a step, and `mirrored_rows` which of its images are mirrored.

`rows` is a slice of positions in a batch, and `numbers` are row numbers in the data set. A batch only depends on step,
`batch_size`, seed and `rows`. So a run can resume at any step, and each rank reads its own rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dumo.io import digest
from dumo.runtime.random import keyed_normal, stream
from dumo.types import Cond, Sample

CACHED_ORDERS = 2  # the current epoch and, for prefetching, the next one
_LOCK = Lock()  # prevents two threads from computing the same order


@runtime_checkable
class Data(Protocol):
    """Samples x (n, *shape), images in [-1, 1], with class indices c (n,), all zero if there are no classes."""

    @property
    def size(self) -> int | None:
        """The number of samples, or None if endless."""
        ...

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Return reference samples x and c: all or n samples of a finite set, or n fresh draws.

        A different `i` gives a different choice or draw.
        """
        ...


@runtime_checkable
class DataSource(Data, Protocol):
    """Data to train on."""

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the samples x (b, *shape) and c (b,) of some rows of a step's global batch of `batch_size` rows.

        No other rows are read, decoded or generated. The result only depends on the arguments. Must be thread-safe.
        """
        ...

    def fingerprint(self) -> str | None:
        """Return a short text that changes if samples are added, removed, renamed or replaced, without decoding.

        Returns None if endless.
        """
        ...

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """Return the data set's row numbers (b,) of some rows of a step's batch, or None if endless."""
        ...


@runtime_checkable
class Finite(Protocol):
    """A finite set of images that can be read in order."""

    def __len__(self) -> int: ...

    def rows(self, rows: slice | Int64[Tensor, " n"], /) -> tuple[Tensor, Tensor]:
        """Return the images at a slice or increasing row numbers, and their classes, without unreadable images.

        They are uint8 or in [-1, 1].
        """
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

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the samples x and c of some rows of a step's batch.

        Each epoch is a different permutation of all rows.
        """
        numbers = self.numbers(step, batch_size, seed, rows)
        return self.x[numbers], self.c[numbers]

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"]:
        """Return the numbers of some rows of a step's batch, (b,)."""
        return rows_of(step, batch_size, size=self.size, seed=seed, rows=rows)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Return all samples, for any n, seed and i."""
        return self.x, self.c

    def __len__(self) -> int:
        return self.size

    def rows(self, rows: slice | Int64[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """Return the samples and classes at these places, as `Finite` has it."""
        return self.x[rows], self.c[rows]

    def fingerprint(self) -> str:
        """Return a digest of all samples and classes."""
        return digest.short(digest.of_tensor(self.x), digest.of_tensor(self.c))


@dataclass(frozen=True)
class HeldOutSplit(TensorData):
    """The training rows of a data set, whose other rows are in `held_out`."""

    full: TensorData  # all rows
    held_out: TensorData
    trained_rows: Int64[Tensor, " n"]  # the training rows' numbers in `full`

    @classmethod
    def of(cls, full: TensorData, held_rows: Int64[Tensor, " k"]) -> "HeldOutSplit":
        """Hold out the rows with these numbers."""
        is_trained = torch.ones(full.size, dtype=torch.bool)
        is_trained[held_rows] = False
        held_out = TensorData(full.x[held_rows], full.c[held_rows])
        (trained_rows,) = is_trained.nonzero(as_tuple=True)
        return cls(full.x[trained_rows], full.c[trained_rows], full, held_out, trained_rows)

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the samples x and c of some rows of a step's batch. Each epoch has all rows that are trained on."""
        numbers = self.numbers(step, batch_size, seed, rows)
        return self.full.x[numbers], self.full.c[numbers]

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"]:
        """Return the numbers in `full` of some rows of a step's batch, (b,)."""
        return self.trained_rows[super().numbers(step, batch_size, seed, rows)]


@dataclass(frozen=True)
class Endless:
    """An endless data set of random samples.

    `sample_map` must compute each row independently, with correctly rounded operations (sums, products, quotients and
    roots). Then a row is the same in any batch; the rounding of other torch operations may depend on the position in
    the batch.
    """

    sample_map: Callable[[Sample], tuple[Sample, Cond]]  # normal numbers (b, width) -> samples x and classes c
    width: int  # the number of normal numbers per row
    size: None = None  # endless

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return fresh i.i.d. draws for some rows of a step's batch, keyed by (seed, step, row)."""
        return self.sample_map(keyed_normal(seed, step, "data", rows=range(batch_size)[rows], shape=[self.width]))

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> None:
        """Return None, because rows never repeat."""

    def fingerprint(self) -> None:
        """Return None, because the run's spec defines the samples."""

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Return the i-th choice of n fresh i.i.d. draws that are in no batch."""
        return self.sample_map(keyed_normal(seed, "reference", i, rows=range(n), shape=[self.width]))


@dataclass(frozen=True)
class Bucketed:
    """Samples of several shapes: a part for each shape, and each batch from one part.

    A part of n rows goes through them epoch after epoch, and makes a batch whenever it has the b rows for one: by the
    end of e epochs that is floor(e n / b) batches. Rows that are left over begin its next batch. So a part of less than
    b rows makes one every few epochs, and no row is lost. Over all parts, e epochs make

        S(e) = sum_k floor(e n_k / b)

    batches. Those of an epoch come in an order that is keyed by the seed and the epoch (`part_of_step`).
    """

    parts: Sequence[DataSource]  # one for each shape; finite, none is empty
    shapes: Sequence[tuple[int, ...]]  # of a sample of each part
    about: str = ""  # the parts, for messages

    @property
    def size(self) -> int:
        """The number of rows of all parts."""
        return sum(self.counts)

    @property
    def counts(self) -> list[int]:
        """The number of rows of each part."""
        return [part.size or 0 for part in self.parts]

    @property
    def ledger(self) -> object:
        """What the images were when they were read (`dumo.data.ledger`), which the parts share; None if not files."""
        return getattr(self.parts[0], "ledger", None)

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the samples x and c of some rows of a step's batch, all of one part."""
        k, number = self.part_of_step(step, batch_size, seed)
        return self.parts[k].batch(number, batch_size, self.part_seed(seed, k), rows)

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """Return the numbers in the data set of some rows of a step's batch, (b,)."""
        k, number = self.part_of_step(step, batch_size, seed)
        return self.parts[k].numbers(number, batch_size, self.part_seed(seed, k), rows)

    def part_seed(self, seed: int, k: int) -> int:
        """Return the seed of part k, in a run with this seed."""
        return stream(seed, "part", k).initial_seed()

    def part_of_step(self, step: int, batch_size: int, seed: int) -> tuple[int, int]:
        """Return the number of the part that makes a step's batch, and the number of the batch within the part."""
        counts = self.counts

        def batches_before(epoch: int) -> list[int]:
            return [epoch * n // batch_size for n in counts]

        # the epoch with S(epoch) <= step < S(epoch + 1)
        epoch = step * batch_size // sum(counts)  # at most that one
        while sum(batches_before(epoch + 1)) <= step:
            epoch += 1
        firsts = batches_before(epoch)  # of each part: the number of its first batch in this epoch
        ends = batches_before(epoch + 1)

        # the epoch's batches, part after part, in an order of their own
        order = torch.randperm(sum(ends) - sum(firsts), generator=stream(seed, "turns", epoch))
        position = int(order[step - sum(firsts)])
        for k, (first, end) in enumerate(zip(firsts, ends, strict=True)):
            if position < end - first:
                return k, first + position
            position -= end - first
        raise AssertionError("an epoch has no other batches than those of its parts")

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Return the reference of the largest part."""
        return self.parts[self.counts.index(max(self.counts))].reference(n, seed, i)

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the data set, which each part has."""
        return self.parts[0].fingerprint()


def rows_of(step: int, batch_size: int, *, size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"]:
    """Return the numbers in a data set of `size` rows of some rows of a step's global batch, (b,).

    Each epoch is a permutation of all rows, keyed by the seed. Batches are cut from the epochs laid end to end, so one
    may have rows of two epochs.
    """
    position = torch.arange(step * batch_size, (step + 1) * batch_size)[rows]
    epoch = position // size
    numbers = torch.empty_like(position)
    for e in epoch.unique().tolist():
        in_epoch = epoch == e
        numbers[in_epoch] = _order(size, seed, e)[position[in_epoch] % size]
    return numbers


def mirrored_rows(step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Bool[Tensor, " b"]:
    """Which of some rows of a step's global batch are mirrored, (b,): each with probability 1/2."""
    return (torch.rand(batch_size, generator=stream(seed, step, "flip")) < 0.5)[rows]


def _order(size: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """Return the order of an epoch's rows, (size,), from a cache, because a large permutation is slower than a step."""
    with _LOCK:
        return _permutation(size, seed, epoch)


@lru_cache(CACHED_ORDERS)
def _permutation(size: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """Return a permutation of the numbers below `size`, keyed by the seed and the epoch."""
    return torch.randperm(size, generator=stream(seed, "epoch", epoch))
