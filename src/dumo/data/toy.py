"""Points in the plane, for which every quantity can be seen."""

from math import pi
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from dumo.data.source import Endless, Source
from dumo.types import Spec

# The moons before the noise, exactly: x is cos or 1 - cos, y is sin or 1/2 - sin of a uniform angle in [0, pi].
CENTRE = torch.tensor([1 / 2, 1 / 4])
SPREAD = torch.tensor([3 / 4, 9 / 16 - 1 / pi]).sqrt()


class Moons(Spec):
    """Two interleaved half circles with Gaussian noise, i.i.d. (ours: scikit-learn's `make_moons` lays a grid)."""

    kind: Literal["moons"] = "moons"
    noise: float = Field(default=0.05, ge=0)  # scikit-learn's examples
    labelled: bool = False  # by the moon: 0 the upper, 1 the lower
    shape: ClassVar[tuple[int, ...]] = (2,)

    @property
    def classes(self) -> int:
        """A class per moon, or none."""
        return 2 if self.labelled else 0

    def open(self) -> Source:
        """An endless source of points, centred, with standard deviation 1 along each axis before the noise."""
        return Endless(self._law)

    def _law(self, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        angle = pi * torch.rand(n, generator=g)
        lower = torch.rand(n, generator=g) < 0.5
        upper = torch.stack([angle.cos(), angle.sin()], 1)
        moons = torch.where(lower[:, None], torch.tensor([1.0, 0.5]) - upper, upper)
        points = moons + self.noise * torch.randn(n, 2, generator=g)
        return (points - CENTRE) / SPREAD, lower.long() if self.labelled else torch.zeros(n, dtype=torch.long)
