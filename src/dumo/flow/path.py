"""Paths from data (t = 0) to noise (t = 1): x_t = alpha(t) z + gamma(t) x (paper, Eq. 1).

x is the data in units of `sd`: they are divided by it before they meet the noise (`dumo.flow.draw`), and samples are
multiplied by it (`dumo.flow.generate`). Constants that are meant for data of standard deviation 1 (noise levels, a
Huber loss's c, EDM's preconditioning) are so right for data of any (docs/adr/0031).
"""

from math import pi
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dumo.types import Sample, Spec, Time, lift

Deviation = Annotated[float, Field(gt=0, exclude_if=lambda sd: sd == 1)]  # of the data; 1, as they are, is not written


class Linear(Spec):
    """alpha(t) = t and gamma(t) = 1 - t, so that v_t = z - x at every time (paper, Sec. 3.2)."""

    kind: Literal["linear"] = "linear"
    sd: Deviation = 1.0

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
    sd: Deviation = 1.0

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
