"""Paths from data (t = 0) to noise (t = 1): x_t = alpha(t) z + gamma(t) x, with data x and noise z.

alpha weighs the noise, as in DuMo's paper (Eq. 1); in diffusers alpha weighs the data.

- `Linear` and `Trig` end at pure noise.
- `Diffusion` stops at the schedule's last time T < 1, before pure noise (ADR 0008).

`FlowPath` is their union, the type of a run's field `path`. Each path has

- `at(x, z, t)`, which a loss calls: x_t, and the velocity v_t = dx_t/dt;
- `alpha(t)` and `gamma(t)`, the weights of noise and data;
- `initial_std`: a sampler starts from `initial_std` times noise;
- `nearest_net_times(times)`: the times at which a sampler may call its net;
- `sd`, the standard deviation of the data.

x is the data in units of `sd`: `dumo.flow.noisy_batch` divides data by it before they meet the noise, and
`dumo.flow.sampling` multiplies samples by it. So constants that are meant for data of standard deviation 1 (noise
levels, a Huber loss's c, EDM's preconditioning) are right for data of any standard deviation.
"""

from collections.abc import Sequence
from math import pi
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dumo.flow.noise_schedule import Schedule
from dumo.types import PINNED, Sample, Spec, Time, UserError, lift

# The standard deviation of the data. It is not written into run.yaml if it is 1, the default.
Deviation = Annotated[float, Field(gt=0, exclude_if=lambda sd: sd == 1)]


def _weight(value: Tensor, x: Sample) -> Tensor:
    """Shape weights (b,) to multiply a sample shaped like x (b, ...), in the type and on the device of x."""
    return lift(value, x).to(x)


class _EndsAtNoise(Spec):
    """A path whose last point is the noise, and whose net may be called at any time."""

    @property
    def initial_std(self) -> float:
        """The standard deviation of a sampler's first x_t: 1, that of the noise."""
        return 1.0

    def nearest_net_times(self, times: Sequence[float]) -> list[float]:
        """The times nearest to `times` at which a net may be called: `times` themselves, since any time may be."""
        return [*times]


class Linear(_EndsAtNoise):
    """alpha(t) = t and gamma(t) = 1 - t, so that v_t = z - x at every time."""

    kind: Literal["linear"] = "linear"
    sd: Deviation = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the noise at time t."""
        return t

    def gamma(self, t: Tensor) -> Tensor:
        """Weight of the data at time t."""
        return 1 - t

    def at(self, x: Sample, z: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return x_t and v_t = dx_t/dt, given data and noise."""
        x_t = _weight(self.alpha(t), x) * z + _weight(self.gamma(t), x) * x
        return x_t, z - x


class Trig(_EndsAtNoise):
    """alpha(t) = sin(pi t / 2) and gamma(t) = cos(pi t / 2): a quarter of a circle (TrigFlow, Lu and Song 2025).

    Its angle is theta = pi t / 2, so that v_t = (pi / 2) (cos(theta) z - sin(theta) x). If the data have standard
    deviation 1, so has x_t at every time.
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
        sin = _weight(self.alpha(t), x)
        cos = _weight(self.gamma(t), x)
        x_t = sin * z + cos * x
        v_t = pi / 2 * (cos * z - sin * x)
        return x_t, v_t


class Diffusion(Spec):
    """The linear path as far as a diffusion's schedule goes: alpha(t) = T t, gamma(t) = 1 - T t, v_t = T (z - x).

    T is the schedule's last time, 0.936 in Stable Diffusion's. Beyond T the net was never trained. At pure noise a net
    that predicts the noise would say nothing of the data. Velocities and mean velocities u = (x_t - x) / t are per unit
    of this t. So what holds of any path with its data at t = 0 holds here.
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
            raise UserError("path.schedule is null, because the pipeline was not found: set pipeline=DIR")
        return self.schedule

    @property
    def initial_std(self) -> float:
        """The standard deviation of a sampler's first x_t, in units of the noise.

        diffusers starts from variance-preserving noise x_vp = z. A point of the linear path is its variance-preserving
        one, x_t / sqrt(T^2 + (1 - T)^2), times that root. So this start is z sqrt(T^2 + (1 - T)^2).
        """
        last = self.known_schedule.last_time
        return (last * last + (1 - last) ** 2) ** 0.5

    def nearest_net_times(self, times: Sequence[float]) -> list[float]:
        """The times of the schedule nearest to `times`: the net was trained at the schedule's whole indices alone.

        `times` must fall. Raises UserError where there are more times than the schedule has.
        """
        schedule = self.known_schedule
        return [float(schedule.times[k]) / schedule.last_time for k in self.nearest_indices(times)]

    def nearest_indices(self, times: Sequence[float]) -> list[int]:
        """The indices of the schedule's times that are nearest to `times`, falling, with no two equal.

        `times` must fall. Where two times are nearest to one entry, the higher of them takes a higher entry; where too
        few entries are left above, the lower one takes a lower entry. Raises UserError where there are more times than
        the schedule has.
        """
        schedule = self.known_schedule
        if len(times) > schedule.steps:
            raise UserError(
                f"nfe={len(times)}, but the pipeline's schedule has {schedule.steps} times: set nfe to "
                f"{schedule.steps} or less"
            )
        rising_indices: list[int] = []
        lowest = 0  # the lowest index that is left
        for k, t in enumerate(reversed(times)):
            highest = schedule.steps - len(times) + k  # the times above need entries, too
            index = min(max(schedule.nearest_index(t * schedule.last_time), lowest), highest)
            rising_indices.append(index)
            lowest = index + 1
        return rising_indices[::-1]

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the noise at time t."""
        return self.known_schedule.last_time * t

    def gamma(self, t: Tensor) -> Tensor:
        """Weight of the data at time t."""
        return 1 - self.known_schedule.last_time * t

    def at(self, x: Sample, z: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return x_t and v_t = dx_t/dt, given data and noise."""
        x_t = _weight(self.alpha(t), x) * z + _weight(self.gamma(t), x) * x
        return x_t, self.known_schedule.last_time * (z - x)


FlowPath = Annotated[Linear | Trig | Diffusion, Field(discriminator="kind")]  # the union of all paths
