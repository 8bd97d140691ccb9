"""Small bundled data sets: two moons in the plane, and scikit-learn's handwritten digits.

`Moons` and `Digits` are the specs, `data` in a run. `Moons.open` returns an infinite source of points, and
`Digits.open` all images with classes or captions. `originals` always returns classes. Digits can be held out of
training.
"""

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
from dumo.io.data_source import DataSource, Endless, HeldOutSplit, TensorData
from dumo.runtime.random import stream
from dumo.types import Spec

# The exact mean and sd of the moons without noise: x is cos or 1 - cos, y is sin or 1/2 - sin of a uniform angle in
# [0, pi].
_MOONS_MEAN = torch.tensor([1 / 2, 1 / 4])
_MOONS_SD = torch.tensor([3 / 4, 9 / 16 - 1 / pi]).sqrt()
# The standard deviation of the noise before scaling, as in scikit-learn's examples.
MOONS_NOISE = 0.05
# The Fréchet distance of 64 pixels needs more than 64 images (our choice).
_MIN_HELD_OUT = 100
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Moons(Spec):
    """Two interleaved half circles with Gaussian noise, i.i.d. (scikit-learn's `make_moons` uses a grid)."""

    kind: Literal["moons"] = "moons"
    # Use the moons as classes: 0 is the upper, 1 the lower.
    labelled: bool = False
    shape: ClassVar[tuple[int, ...]] = (2,)
    captions: ClassVar[None] = None
    names: ClassVar[tuple[str, ...]] = ()
    augment: ClassVar[None] = None

    @property
    def classes(self) -> int:
        """The number of classes, 2 or 0."""
        return 2 if self.labelled else 0

    @property
    def labels(self) -> int:
        """The number of classes. Points have no captions."""
        return self.classes

    def open(self) -> DataSource:
        """Return an infinite source of centred points, with sd 1 along each axis without noise."""
        return Endless(self._points, width=4)

    def originals(self) -> DataSource:
        """Return the source of points, as `open`. They have no captions."""
        return self.open()

    def _points(self, normals: Float[Tensor, "b 4"]) -> tuple[Float[Tensor, "b 2"], Int64[Tensor, " b"]]:
        """Compute a point and its class from each row of four normal numbers.

        The direction of the first two is uniform on the circle. Reflected to y >= 0, it is a point of the upper half
        circle, and the reflection selects the moon with probability 1/2. The last two are the noise.
        """
        right, up, *noise = normals.T
        radius = (right * right + up * up).sqrt()
        is_lower = up < 0
        upper_moon = torch.stack([right / radius, up.abs() / radius], 1)
        lower_moon = torch.tensor([1.0, 0.5]) - upper_moon
        moons = torch.where(is_lower[:, None], lower_moon, upper_moon)
        points = moons + MOONS_NOISE * torch.stack(noise, 1)
        c = is_lower.long() if self.labelled else torch.zeros_like(is_lower, dtype=torch.long)
        return (points - _MOONS_MEAN) / _MOONS_SD, c


class Digits(Spec):
    """1,797 grey images of ten classes. They are not flipped, since a mirrored 2 is not a 2."""

    kind: Literal["digits"] = "digits"
    # Captions replace classes as conditions.
    captions: Templates | None = Field(default=None, exclude_if=lambda captions: captions is None)
    # The number of images held out of training, at most half.
    held: int = Field(default=0, ge=0, le=898, exclude_if=lambda held: held == 0)
    # Selects the held-out images. With held=359 there are five disjoint folds.
    fold: int = Field(default=0, ge=0, exclude_if=lambda fold: fold == 0)
    shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    names: ClassVar[tuple[str, ...]] = ()
    augment: ClassVar[None] = None
    labels: ClassVar[int] = len(DIGIT_NAMES)

    @property
    def classes(self) -> int:
        """Ten, or the number of captions."""
        return self.captions.num_captions(self.labels) if self.captions else self.labels

    @model_validator(mode="after")
    def _require_possible(self) -> "Digits":
        if self.captions:
            # Making the captions raises if templates contradict the classes.
            self.captions.all_captions(DIGIT_NAMES)
        if 0 < self.held < _MIN_HELD_OUT:
            raise ValueError(
                f"held = {self.held} images are too few for evaluation: hold out {_MIN_HELD_OUT} or more, or 0"
            )
        return self

    def caption_texts(self) -> tuple[str, ...]:
        """Return the text of each caption by its number, or ()."""
        return self.captions.all_captions(DIGIT_NAMES).texts if self.captions else ()

    def open(self) -> DataSource:
        """Return all images (1, 8, 8) in memory, with 17 grey levels in [-1, 1], with classes or captions."""
        originals = self.originals()
        if self.captions is None:
            return originals

        return Captioned(originals, self.captions.all_captions(DIGIT_NAMES))

    def originals(self) -> TensorData:
        """Return the images with the digits as classes; a `HeldOutSplit` if some are held out."""
        images, c = _read_digits()
        all_digits = TensorData(images, c)
        if not self.held:
            return all_digits
        return HeldOutSplit.of(all_digits, _held_out_rows(self.held, c, self.fold))


@cache
def _read_digits() -> tuple[Tensor, Tensor]:
    """Read the images (1797, 1, 8, 8) in [-1, 1] and classes (1797,) of scikit-learn's `load_digits`.

    The file is read without importing scikit-learn, which takes a second.
    """
    package = find_spec("sklearn")
    assert package
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    # (1797, 65): levels 0 to 16, and the class.
    rows = torch.from_numpy(np.loadtxt(file, np.float32, delimiter=","))
    return rows[:, :-1].view(-1, *Digits.shape) / 8 - 1, rows[:, -1].long()


def _held_out_rows(n: int, c: Tensor, fold: int) -> Int64[Tensor, " n"]:
    """Return the sorted rows (n,) of held-out images, which do not depend on the run.

    They are stratified by class. Folds are disjoint, and repeat after len(c) // n folds.
    """
    order = torch.randperm(len(c), generator=stream("digits", "held"))
    by_class = order[c[order].argsort(stable=True)]
    # The spacing is at least len(c) // n.
    evenly_spaced = torch.arange(n) * len(c) // n
    offset = fold % (len(c) // n)
    return by_class[evenly_spaced + offset].sort().values
