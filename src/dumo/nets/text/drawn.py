"""Random rows in the place of a table that is not there yet, for who asks what a step costs or whether it is right."""

from typing import Literal

import torch
from torch import nn

from dumo.nets.text.learned import Encoded, Learned
from dumo.nets.text.rows import Rows, Texts, Told
from dumo.nets.text.table import TextTable
from dumo.random import stream
from dumo.texts.table import FILE
from dumo.types import Cond, Spec

ROWS = 16  # that stand for all: ours


class Drawn(Spec):
    """Texts of one token and more."""

    kind: Literal["drawn"] = "drawn"
    of: TextTable | Learned  # whose sizes these are

    def build(self, classes: int) -> "Few":
        """Rows of these sizes; on the meta device without numbers."""
        if torch.get_default_device().type == "meta":
            return Few(self.of.build(ROWS - 1))
        g, most = stream("texts"), self.of.by.length
        mask = torch.arange(most) < (torch.arange(ROWS) % most + 1)[:, None]
        if isinstance(self.of, Learned):
            ids = torch.randint(self.of.vocabulary, mask.shape, generator=g)
            return Few(Encoded(self.of, ids.int(), mask))
        tokens = torch.randn(*mask.shape, self.of.width, generator=g)
        pooled = torch.randn(ROWS, self.of.pooled, generator=g) if self.of.pooled else None
        return Few(Rows(tokens, None if self.of.encoder.pad else mask, pooled))


class Few(Texts):
    """A few rows by turns."""

    def __init__(self, of: Texts) -> None:
        """As wide and long as they are."""
        super().__init__()
        self.of: nn.Module = of
        self.width, self.pooled_width, self.length, self.masked = of.width, of.pooled_width, of.length, of.masked

    def forward(self, c: Cond) -> Told:
        """The row of c, counted from 0 again behind the last."""
        return self.of(c % ROWS)


def at_hand(texts: object) -> object:
    """Drawn rows for a table that is not there; else what is given."""
    if isinstance(texts, TextTable | Learned) and not (texts.folder / FILE).exists():
        return Drawn(of=texts)
    return texts
