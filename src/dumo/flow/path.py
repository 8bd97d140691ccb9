"""Paths from data (t = 0) to noise (t = 1): x_t = alpha(t) z + gamma(t) x (paper, Eq. 1)."""

from math import pi
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dumo.types import Sample, Spec, Time, lift


class Linear(Spec):
    """alpha(t) = t and gamma(t) = 1 - t, so that v_t = z - x at every time (paper, Sec. 3.2)."""

    kind: Literal["linear"] = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the noise at time t."""
        return t

    def gamma(self, t: Tensor) -> Tensor:
        """Weight of the data at time t."""
        return 1 - t

    def at(self, x: Sample, z: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return x_t and v_t = dx_t/dt, given data and noise (Alg. 1, lines 4 and 5)."""
        return lift(self.alpha(t), x).to(x) * z + lift(self.gamma(t), x).to(x) * x, z - x


class Trig(Spec):
    """alpha(t) = sin(pi t / 2) and gamma(t) = cos(pi t / 2): a quarter of a circle (TrigFlow, Lu and Song 2025).

    Its angle is theta = pi t / 2, so that v_t = (pi / 2) (cos(theta) z - sin(theta) x). With data of standard
    deviation 1 x_t has that at every time.
    """

    kind: Literal["trig"] = "trig"

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the noise at time t."""
        return (t * pi / 2).sin()

    def gamma(self, t: Tensor) -> Tensor:
        """Weight of the data at time t."""
        return (t * pi / 2).cos()

    def at(self, x: Sample, z: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return x_t and v_t = dx_t/dt, given data and noise."""
        sin, cos = lift(self.alpha(t), x).to(x), lift(self.gamma(t), x).to(x)
        return sin * z + cos * x, pi / 2 * (cos * z - sin * x)


Path = Annotated[Linear | Trig, Field(discriminator="kind")]  # the union of all paths
