"""Nets of random weights, what they take, and texts made on the spot, instead of a table of embeddings."""

from typing import Any, Literal

import torch
from torch import Tensor

from dumo.nets import Net
from dumo.nets.text_rows import Rows
from dumo.testing.network import randomise
from dumo.types import Needs, Spec
from rows_given import given_rows


def points(n: int, shape: tuple[int, ...] = (3, 4, 4), classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """x, c and t in float64; all classes in turn, and none."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(n, *shape, generator=g).double(), torch.rand(n, generator=g).double()
    return x, torch.arange(n) % (classes + 1), t


def drawn(net: Net, needs: Needs, shape: tuple[int, ...] = (3, 4, 4), classes: int = 5) -> Any:  # noqa: ANN401
    """A net in float64, every parameter drawn."""
    return randomise(net.build(needs, shape, classes)).double()


class Given(Spec):
    """Drawn texts of one to `length` tokens, padded to `room`; the last is of no caption."""

    kind: Literal["given"] = "given"
    length: int = 4
    room: int = 4
    width: int = 6
    pooled: int = 0
    masked: bool = True

    def build(self, classes: int) -> Rows:
        """Numbers are the same whatever the room; the padding is not zero."""
        g, n = torch.Generator().manual_seed(3), classes + 1
        tokens, pooled = torch.randn(n, self.length, self.width, generator=g), torch.randn(n, self.pooled, generator=g)
        rest = torch.full((n, self.room - self.length, self.width), 7.0)
        lengths = torch.arange(n) % self.length + 1
        mask = torch.arange(self.room) < lengths[:, None]
        return given_rows(torch.cat([tokens, rest], 1), mask if self.masked else None, pooled if self.pooled else None)


class Labels(Spec):
    """A table whose pooled rows are these numbers."""

    rows: tuple[tuple[float, ...], ...]

    def build(self, classes: int) -> Rows:
        """A zero is the token of each."""
        pooled = torch.tensor(self.rows)
        assert len(pooled) == classes + 1
        return given_rows(torch.zeros(classes + 1, 1, 1), pooled=pooled)
