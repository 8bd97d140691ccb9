"""Points in the plane, for which every quantity can be seen."""

from math import pi
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dumo.io.source import Endless, Source
from dumo.types import Spec

# The moons before the noise, exactly: x is cos or 1 - cos, y is sin or 1/2 - sin of a uniform angle in [0, pi].
CENTRE = torch.tensor([1 / 2, 1 / 4])
SPREAD = torch.tensor([3 / 4, 9 / 16 - 1 / pi]).sqrt()
NOISE = 0.05  # its standard deviation, as in scikit-learn's examples


class Moons(Spec):
    """Two interleaved half circles with Gaussian noise, i.i.d. (ours: scikit-learn's `make_moons` lays a grid)."""

    kind: Literal["moons"] = "moons"
    labelled: bool = False  # by the moon: 0 the upper, 1 the lower
    shape: ClassVar[tuple[int, ...]] = (2,)

    @property
    def classes(self) -> int:
        """A class per moon, or none."""
        return 2 if self.labelled else 0

    @property
    def labels(self) -> int:
        """The same: points have no captions."""
        return self.classes

    def open(self) -> Source:
        """An endless source of points, centred, with standard deviation 1 along each axis before the noise."""
        return Endless(self._law, width=4)

    def _law(self, numbers: Float[Tensor, "b 4"]) -> tuple[Float[Tensor, "b 2"], Int64[Tensor, " b"]]:
        """Of two normal numbers the direction is uniform: folded up it is a point of the upper moon; the fold is fair.

        Two more are the noise.
        """
        right, up, *noise = numbers.T
        far, lower = (right * right + up * up).sqrt(), up < 0
        upper = torch.stack([right / far, up.abs() / far], 1)
        moons = torch.where(lower[:, None], torch.tensor([1.0, 0.5]) - upper, upper)
        points = moons + NOISE * torch.stack(noise, 1)
        return (points - CENTRE) / SPREAD, lower.long() if self.labelled else torch.zeros_like(lower, dtype=torch.long)
