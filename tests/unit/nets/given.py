"""Texts made on the spot, instead of a table of embeddings."""

from typing import Literal

import torch

from dumo.nets.rows import Rows
from dumo.types import Spec


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
        return Rows(torch.cat([tokens, rest], 1), mask if self.masked else None, pooled if self.pooled else None)


class Labels(Spec):
    """A table whose pooled rows are these numbers."""

    rows: tuple[tuple[float, ...], ...]

    def build(self, classes: int) -> Rows:
        """A zero is the token of each."""
        pooled = torch.tensor(self.rows)
        assert len(pooled) == classes + 1
        return Rows(torch.zeros(classes + 1, 1, 1), None, pooled)
