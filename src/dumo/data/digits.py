"""Handwritten digits, 8 x 8, that come with scikit-learn (Alpaydin & Kaynak 1998): real images without a network."""

from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dumo.data.source import Source, Table
from dumo.types import Spec


class Digits(Spec):
    """1,797 grey images of ten classes. Never flipped: a mirrored 2 is not a 2."""

    kind: Literal["digits"] = "digits"
    shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    classes: ClassVar[int] = 10

    def open(self) -> Source:
        """All rows in memory, in [-1, 1], of 17 grey levels."""
        return Table(*_load())


@cache
def _load() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # slow to import

    levels, target = load_digits(return_X_y=True)  # (1797, 64) in 0 ... 16
    x = torch.tensor(levels, dtype=torch.float32).view(-1, *Digits.shape) / 8 - 1
    return x, torch.tensor(target, dtype=torch.long)
