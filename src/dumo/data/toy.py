"""Small data that come without files: two moons in the plane, and scikit-learn's handwritten digits."""

from functools import cache
from importlib.util import find_spec
from math import pi
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor

from dumo.data.caption import Captioned, Templates
from dumo.io.source import DataSource, Endless, HeldOutSplit, TensorData
from dumo.runtime.random import stream
from dumo.types import Spec

# The moons before the noise, exactly: x is cos or 1 - cos, y is sin or 1/2 - sin of a uniform angle in [0, pi].
CENTRE = torch.tensor([1 / 2, 1 / 4])
SPREAD = torch.tensor([3 / 4, 9 / 16 - 1 / pi]).sqrt()
NOISE = 0.05  # its standard deviation, as in scikit-learn's examples
FEWEST = 100  # images held out: a distance of their 64 pixels takes more than 64. Ours
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Moons(Spec):
    """Two interleaved half circles with Gaussian noise, i.i.d. (ours: scikit-learn's `make_moons` lays a grid)."""

    kind: Literal["moons"] = "moons"
    labelled: bool = False  # by the moon: 0 the upper, 1 the lower
    shape: ClassVar[tuple[int, ...]] = (2,)
    captions: ClassVar[None] = None
    names: ClassVar[tuple[str, ...]] = ()
    augment: ClassVar[None] = None

    @property
    def classes(self) -> int:
        """A class per moon, or none."""
        return 2 if self.labelled else 0

    @property
    def labels(self) -> int:
        """The number of classes: points have no captions."""
        return self.classes

    def open(self) -> DataSource:
        """An endless source of points, centred, with standard deviation 1 along each axis before the noise."""
        return Endless(self._points, width=4)

    def _points(self, numbers: Float[Tensor, "b 4"]) -> tuple[Float[Tensor, "b 2"], Int64[Tensor, " b"]]:
        """Of two normal numbers the direction is uniform: folded up it is a point of the upper moon; the fold is fair.

        Two more are the noise.
        """
        right, up, *noise = numbers.T
        far = (right * right + up * up).sqrt()
        lower = up < 0
        upper = torch.stack([right / far, up.abs() / far], 1)
        moons = torch.where(lower[:, None], torch.tensor([1.0, 0.5]) - upper, upper)
        points = moons + NOISE * torch.stack(noise, 1)
        return (points - CENTRE) / SPREAD, lower.long() if self.labelled else torch.zeros_like(lower, dtype=torch.long)


class Digits(Spec):
    """1,797 grey images of ten classes. Never flipped: a mirrored 2 is not a 2."""

    kind: Literal["digits"] = "digits"
    captions: Templates | None = Field(
        default=None, exclude_if=lambda captions: captions is None
    )  # in place of classes
    held: int = Field(default=0, ge=0, le=898, exclude_if=lambda held: held == 0)  # images that are never trained on
    fold: int = Field(default=0, ge=0, exclude_if=lambda fold: fold == 0)  # which ones: of 359, five disjoint folds
    shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    names: ClassVar[tuple[str, ...]] = ()
    augment: ClassVar[None] = None
    labels: ClassVar[int] = len(NAMES)

    @property
    def classes(self) -> int:
        """Ten, or the number of captions."""
        return self.captions.count(self.labels) if self.captions else self.labels

    @model_validator(mode="after")
    def _possible(self) -> "Digits":
        self.caption_texts()  # raises
        if 0 < self.held < FEWEST:
            raise ValueError(f"held = {self.held} images are too few to be judged against: hold {FEWEST} or more, or 0")
        return self

    def caption_texts(self) -> tuple[str, ...]:
        """The text of each caption, by its number; () where there are none."""
        return self.captions.of(NAMES).texts if self.captions else ()

    def open(self) -> DataSource:
        """All rows in memory, in [-1, 1], of 17 grey levels."""
        return Captioned(self.originals(), self.captions.of(NAMES)) if self.captions else self.originals()

    def originals(self) -> TensorData:
        """The images with the digits as classes; a `HeldOutSplit` where some are held out."""
        full = TensorData(*_load())
        return HeldOutSplit.of(full, _held_rows(self.held, full.c, self.fold)) if self.held else full


@cache
def _load() -> tuple[Tensor, Tensor]:
    """The file of scikit-learn's `load_digits`, read without scikit-learn: its import takes a second."""
    package = find_spec("sklearn")
    assert package
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(file, np.float32, delimiter=","))  # (1797, 65): levels, and the class
    return rows[:, :-1].view(-1, *Digits.shape) / 8 - 1, rows[:, -1].long()


def _held_rows(n: int, c: Tensor, fold: int = 0) -> Int64[Tensor, " n"]:
    """The rows (n,) of images that are held out, equal in every run: of each class its share, to a row.

    Folds have no row in common, until there are no rows left: the next fold is the first again.
    """
    order = torch.randperm(len(c), generator=stream("digits", "held"))
    by_class = order[c[order].argsort(stable=True)]
    return by_class[torch.arange(n) * len(c) // n + fold % (len(c) // n)].sort().values
