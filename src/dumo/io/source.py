"""What data sets give: batches to train on, a reference to be compared with, rows to be gone through.

Which rows a step sees is endless and without state, so that a run resumes by its step number alone.
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
from dumo.runtime.random import keyed, stream
from dumo.types import Cond, Sample

ORDERS = 2  # kept: batches are made ahead across the end of an epoch. Ours
_LOCK = Lock()  # a cache alone would let two threads make one order each


@runtime_checkable
class Data(Protocol):
    """Samples x (n, *shape), images in [-1, 1], with class indices c (n,), all zero where there are no classes."""

    @property
    def size(self) -> int | None:
        """How many samples there are; None where they never end."""
        ...

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """What samples are compared with: all of a finite set, else n fresh draws, the i-th time."""
        ...


@runtime_checkable
class Source(Data, Protocol):
    """Data to train on."""

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The rows `rows` of a step's global batch of `batch` rows; no others are read, decoded or drawn.

        A function of its arguments alone, that several threads may call at once.
        """
        ...

    def fingerprint(self) -> str | None:
        """A short text, another one where samples were added, removed, renamed or replaced; decodes nothing.

        None where samples never end.
        """
        ...

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """Which of the data set these rows are, by number; None where it never ends."""
        ...


@runtime_checkable
class Finite(Protocol):
    """A finite set of images that can be gone through, each once."""

    def __len__(self) -> int: ...

    def rows(self, rows: slice, /) -> tuple[Tensor, Tensor]:
        """A stretch of them, uint8 or in [-1, 1], with their classes; fewer where some cannot be read."""
        ...


@dataclass(frozen=True)
class Table:
    """A finite data set in memory."""

    x: Tensor
    c: Tensor

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.x)

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Epoch after epoch, each in its own order."""
        places = rows_of(step, batch, size=self.size, seed=seed, rows=rows)
        return self.x[places], self.c[places]

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"]:
        """Their places in the table."""
        return rows_of(step, batch, size=self.size, seed=seed, rows=rows)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Every row; n, seed and i do not matter."""
        return self.x, self.c

    def fingerprint(self) -> str:
        """Of all numbers and classes."""
        return digest.short(digest.of_tensor(self.x), digest.of_tensor(self.c))


@dataclass(frozen=True)
class Split(Table):
    """A table of the rows that are trained on, with all of them and those held out, which no batch has."""

    whole: Table
    held: Table

    @classmethod
    def of(cls, whole: Table, held: Int64[Tensor, " k"]) -> "Split":
        """All rows but those of these numbers."""
        rest = torch.ones(whole.size, dtype=torch.bool)
        rest[held] = False
        return cls(whole.x[rest], whole.c[rest], whole, Table(whole.x[held], whole.c[held]))


@dataclass(frozen=True)
class Endless:
    """A data set that is drawn: a map of `width` normal numbers a row to samples with their class indices.

    To be the same in any batch, a row must be made of its own numbers alone, by operations that are rounded once, as
    sums, products, quotients and roots are: what torch rounds otherwise may depend on the place in the batch.
    """

    law: Callable[[Sample], tuple[Sample, Cond]]
    width: int
    size: None = None

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Fresh i.i.d. draws, keyed by (seed, step, row)."""
        return self.law(keyed(seed, step, "data", rows=range(batch)[rows], shape=[self.width]))

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> None:
        """None: no row comes twice."""

    def fingerprint(self) -> None:
        """None: the run says what they are."""

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """n fresh i.i.d. draws that no batch has seen."""
        return self.law(keyed(seed, "reference", i, rows=range(n), shape=[self.width]))


@dataclass(frozen=True)
class Bucketed:
    """Samples of several shapes, each batch of one of them: a source without state, as the others.

    A part of n rows goes through them epoch after epoch, and makes a batch whenever it has the rows for one: by the end
    of epoch e that is floor(e n / batch) batches. What is left over begins the next one, so a part of less than a batch
    makes one every few epochs, and no row is lost. Over all parts, epoch e begins at step

        S(e) = sum_k floor(e n_k / batch),

    and its batches come in an order of their own, keyed by the seed.
    """

    parts: Sequence[Source]  # finite, none is empty
    shapes: Sequence[tuple[int, ...]]  # of a sample of each part
    about: str = ""  # in words

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
        """Of the images, which the parts share."""
        return getattr(self.parts[0], "hashes", None)

    @property
    def origin(self) -> object:
        """Of latents."""
        return getattr(self.parts[0], "origin", None)

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """A batch of one part."""
        k, number = self.turn(step, batch, seed)
        return self.parts[k].batch(number, batch, self.seed(seed, k), rows)

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """Those of the part's rows in the data set."""
        k, number = self.turn(step, batch, seed)
        return self.parts[k].numbers(number, batch, self.seed(seed, k), rows)

    def seed(self, seed: int, k: int) -> int:
        """That of part k."""
        return stream(seed, "part", k).initial_seed()

    def shape(self, step: int, batch: int, seed: int) -> tuple[int, ...]:
        """Of the samples of a step."""
        return self.shapes[self.turn(step, batch, seed)[0]]

    def turn(self, step: int, batch: int, seed: int) -> tuple[int, int]:
        """Whose turn it is at a step, and the number of that batch among the part's own."""
        counts = self.counts

        def done(epoch: int) -> list[int]:
            return [epoch * n // batch for n in counts]

        epoch = step * batch // sum(counts)  # S(epoch) is at most step
        while sum(done(epoch + 1)) <= step:
            epoch += 1
        first, last = done(epoch), done(epoch + 1)
        order = torch.randperm(sum(last) - sum(first), generator=stream(seed, "turns", epoch))
        place = int(order[step - sum(first)])
        for k, (begin, end) in enumerate(zip(first, last, strict=True)):
            if place < end - begin:
                return k, begin + place
            place -= end - begin
        raise AssertionError("the places of an epoch are its parts'")

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """That of the largest part."""
        return self.parts[self.counts.index(max(self.counts))].reference(n, seed, i)

    def fingerprint(self) -> str | None:
        """Of the data set."""
        return self.parts[0].fingerprint()


def rows_of(step: int, batch: int, *, size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"]:
    """Row numbers (b,) of a global step, out of `size`: each epoch is one keyed permutation, laid end to end.

    Those of the places `rows` of the global batch.
    """
    place = torch.arange(step * batch, (step + 1) * batch)[rows]
    epoch, found = place // size, torch.empty_like(place)
    for e in epoch.unique().tolist():
        here = epoch == e
        found[here] = _order(size, seed, e)[place[here] % size]
    return found


def mirrored(step: int, batch: int, seed: int, rows: slice = slice(None)) -> Bool[Tensor, " b"]:
    """Which of the rows `rows` of a global step's batch are mirrored: each with probability 1/2."""
    return (torch.rand(batch, generator=stream(seed, step, "flip")) < 0.5)[rows]


def _order(size: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """An epoch's order, made once: of millions of rows it takes longer than a step."""
    with _LOCK:
        return _permuted(size, seed, epoch)


@lru_cache(ORDERS)
def _permuted(size: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    return torch.randperm(size, generator=stream(seed, "epoch", epoch))
