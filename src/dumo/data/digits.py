"""Handwritten digits, 8 x 8, that come with scikit-learn (Alpaydin & Kaynak 1998): real images without a network."""

from functools import cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor

from dumo.data.caption import Captioned, Templates
from dumo.io.source import Source, Split, Table
from dumo.runtime.random import stream
from dumo.types import Spec

FEWEST = 100  # images held out: a distance of their 64 pixels takes more than 64. Ours
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(Spec):
    """1,797 grey images of ten classes. Never flipped: a mirrored 2 is not a 2."""

    kind: Literal["digits"] = "digits"
    captions: Templates | None = Field(
        default=None, exclude_if=lambda captions: captions is None
    )  # in place of classes
    held: int = Field(default=0, ge=0, le=898, exclude_if=lambda held: held == 0)  # images that are never trained on
    shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    labels: ClassVar[int] = len(NAMES)

    @property
    def classes(self) -> int:
        """Ten, or how many captions there are."""
        return self.captions.count(self.labels) if self.captions else self.labels

    @model_validator(mode="after")
    def _has_captions(self) -> "Digits":
        self.caption_texts()  # raises
        return self

    @model_validator(mode="after")
    def _holds_enough(self) -> "Digits":
        if 0 < self.held < FEWEST:
            raise ValueError(f"held = {self.held} images are too few to be judged against: hold {FEWEST} or more, or 0")
        return self

    def caption_texts(self) -> tuple[str, ...]:
        """All captions by number; () where there are none."""
        return self.captions.of(NAMES).texts if self.captions else ()

    def open(self) -> Source:
        """All rows in memory, in [-1, 1], of 17 grey levels."""
        return Captioned(self.originals(), self.captions.of(NAMES)) if self.captions else self.originals()

    def originals(self) -> Table:
        """The same with the digits as classes; without those held out, which it keeps apart (`Split`)."""
        whole = Table(*_load())
        return Split.of(whole, _held(self.held, whole.c)) if self.held else whole


@cache
def _load() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # slow to import

    levels, target = load_digits(return_X_y=True)  # (1797, 64) in 0 ... 16
    x = torch.tensor(levels, dtype=torch.float32).view(-1, *Digits.shape) / 8 - 1
    return x, torch.tensor(target, dtype=torch.long)


def _held(n: int, c: Tensor) -> Int64[Tensor, " n"]:
    """n rows, the same in every run: of each class its share, to a row, and of these any."""
    order = torch.randperm(len(c), generator=stream("digits", "held"))
    by_class = order[c[order].argsort(stable=True)]
    return by_class[torch.arange(n) * len(c) // n].sort().values
