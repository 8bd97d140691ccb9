"""Paths from data (t = 0) to noise (t = 1): x_t = alpha(t) z + gamma(t) x (paper, Eq. 1).

A diffusion's ends a little below the noise (docs/adr/0008): what a sampler begins with is the noise times `spread`.

x is the data in units of `sd`: they are divided by it before they meet the noise (`dumo.flow.draw`), and samples are
multiplied by it (`dumo.flow.generate`). Constants that are meant for data of standard deviation 1 (noise levels, a
Huber loss's c, EDM's preconditioning) are so right for data of any (docs/adr/0008).

A loss calls `at`; a sampler begins at `spread` and asks `near` for times at which its net may be called.
"""

from collections.abc import Sequence
from math import pi
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from dumo.types import PINNED, Sample, Spec, Time, UserError, lift
from dumo.types.family import LazySpec

if TYPE_CHECKING:
    from dumo.flow.schedule import Schedule
else:
    Schedule = Annotated[Any, LazySpec("dumo.flow.schedule:Schedule")]

# The standard deviation of the data. It is not written into run.yaml if it is 1, the default.
Deviation = Annotated[float, Field(gt=0, exclude_if=lambda sd: sd == 1)]


class _ToNoise(Spec):
    """A path whose last point is the noise, and whose net may be called at any time."""

    @property
    def spread(self) -> float:
        """The standard deviation of what a sampler begins with: 1, that of the noise."""
        return 1.0

    def near(self, times: Sequence[float]) -> list[float]:
        """The times at which a net may be called, nearest to these: the times themselves."""
        return [*times]


class Linear(_ToNoise):
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
        x_t = lift(self.alpha(t), x).to(x) * z + lift(self.gamma(t), x).to(x) * x
        return x_t, z - x


class Trig(_ToNoise):
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
        sin = lift(self.alpha(t), x).to(x)
        cos = lift(self.gamma(t), x).to(x)
        x_t = sin * z + cos * x
        v_t = pi / 2 * (cos * z - sin * x)
        return x_t, v_t


class Diffusion(Spec):
    """The linear path as far as a diffusion's schedule goes: alpha(t) = T t, gamma(t) = 1 - T t, v_t = T (z - x).

    T is the schedule's last time, .936 of Stable Diffusion's: behind it nothing was ever trained, and an output that
    is noise says nothing of the data at T = 1. Velocities and mean velocities u = (x_t - x) / t are per unit of this
    t, so all that holds of a path whose data lie at t = 0 holds.
    """

    kind: Literal["diffusion"] = "diffusion"
    schedule: Schedule | None = Field(default=None, json_schema_extra=PINNED)  # the pipeline's

    @property
    def sd(self) -> float:
        """The data are in the model's own units."""
        return 1.0

    @property
    def known_schedule(self) -> "Schedule":
        """The pipeline's schedule. Raises UserError where none was found."""
        if self.schedule is None:
            raise UserError("path.schedule is the pipeline's, which is not here: pipeline=DIR names its folder")
        return self.schedule

    @property
    def spread(self) -> float:
        """The standard deviation of what a sampler begins with: of x_vp = z, as in diffusers, on the linear path."""
        last = self.known_schedule.last
        return (last * last + (1 - last) ** 2) ** 0.5

    def near(self, times: Sequence[float]) -> list[float]:
        """The times of the table nearest to these falling ones: stock programs call a net at whole indices.

        Raises UserError where there are more times than entries.
        """
        schedule = self.known_schedule
        return [float(schedule.times[k]) / schedule.last for k in self.indices(times)]

    def indices(self, times: Sequence[float]) -> list[int]:
        """The indices of the table that are nearest to falling times, falling, and no two equal.

        Where two times are nearest to one entry, the times above it take higher ones. Raises UserError where there are
        more times than entries.
        """
        schedule = self.known_schedule
        if len(times) > schedule.steps:
            raise UserError(
                f"{len(times):,} passes jump at as many times, and the pipeline's table has {schedule.steps:,}: "
                f"nfe = {schedule.steps} at most"
            )
        rising_indices: list[int] = []
        lowest = 0  # the lowest index that is left
        for k, t in enumerate(reversed(times)):
            highest = schedule.steps - len(times) + k  # the times above need entries, too
            index = min(max(schedule.near(t * schedule.last), lowest), highest)
            rising_indices.append(index)
            lowest = index + 1
        return rising_indices[::-1]

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the noise at time t."""
        return self.known_schedule.last * t

    def gamma(self, t: Tensor) -> Tensor:
        """Weight of the data at time t."""
        return 1 - self.known_schedule.last * t

    def at(self, x: Sample, z: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return x_t and v_t = dx_t/dt, given data and noise."""
        x_t = lift(self.alpha(t), x).to(x) * z + lift(self.gamma(t), x).to(x) * x
        return x_t, self.known_schedule.last * (z - x)


Path = Annotated[Linear | Trig | Diffusion, Field(discriminator="kind")]  # the union of all paths
