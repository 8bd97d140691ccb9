"""What data sets give: batches to train on, a reference to be compared with, rows to be gone through."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dumo.data.epoch import rows_of
from dumo.random import stream


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

    def batch(self, step: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """The global batch of a step."""
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

    def batch(self, step: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Epoch after epoch, each in its own order."""
        rows = rows_of(step, batch, size=self.size, seed=seed)
        return self.x[rows], self.c[rows]

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Every row; n, seed and i do not matter."""
        return self.x, self.c


@dataclass(frozen=True)
class Endless:
    """A data set that is drawn: `law(n, generator) -> (x, c)`."""

    law: "Law"
    size: None = None

    def batch(self, step: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Fresh i.i.d. draws, keyed by (seed, step)."""
        return self.law(batch, stream(seed, step, "data"))

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """n fresh i.i.d. draws that no batch has seen."""
        return self.law(n, stream(seed, "reference", i))


@runtime_checkable
class Law(Protocol):
    """A distribution to draw from."""

    def __call__(self, n: int, generator: torch.Generator, /) -> tuple[Tensor, Tensor]:
        """n samples with their class indices, all zero where there are no classes."""
        ...
