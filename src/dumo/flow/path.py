"""Paths from data (t = 0) to noise (t = 1): x_t = alpha(t) z + gamma(t) x, with data x and noise z.

alpha is the weight of the noise, as in DuMo's paper (Eq. 1); in diffusers alpha is the weight of the data.

- `Linear` and `Trig` end at pure noise.
- `Diffusion` stops at the schedule's last time T < 1, before pure noise (ADR 0008).

`FlowPath` is their union, the type of a run's field `path`. Each path has

- `at(x, z, t)`: x_t, and the velocity v_t = dx_t/dt;
- `alpha(t)` and `gamma(t)`: the weights of noise and data;
- `initial_std`: a sampler starts from `initial_std` times noise;
- `nearest_net_times(times)`: the times at which a sampler may call the network;
- `sd`: the standard deviation of the data.

x is the data in units of `sd`: `dumo.flow.noisy_batch` divides data by it, and `dumo.flow.sampling` multiplies samples
by it. Constants for data of standard deviation 1 (noise levels, a Huber loss's c, EDM's preconditioning) therefore
apply to data of any standard deviation.
"""

from collections.abc import Sequence
from math import pi
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dumo.flow.noise_schedule import Schedule
from dumo.types import PINNED, Sample, Spec, Time, UserError, lift

# The standard deviation of the data. run.yaml omits the default, 1.
Deviation = Annotated[float, Field(gt=0, exclude_if=lambda sd: sd == 1)]


def _weight(value: Tensor, x: Sample) -> Tensor:
    """Shape weights (b,) to multiply a sample shaped like x (b, ...), in the type and on the device of x."""
    return lift(value, x).to(x)


class _EndsAtNoise(Spec):
    """A path that ends at pure noise, with a network that may be called at any time."""

    @property
    def initial_std(self) -> float:
        """The standard deviation of a sampler's first x_t."""
        return 1.0

    def nearest_net_times(self, times: Sequence[float]) -> list[float]:
        """Return the nearest times at which the network may be called: `times` themselves."""
        return [*times]


class Linear(_EndsAtNoise):
    """The linear path: alpha(t) = t and gamma(t) = 1 - t, so that v_t = z - x at every time."""

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
    """The trigonometric path: alpha(t) = sin(pi t / 2) and gamma(t) = cos(pi t / 2) (TrigFlow, Lu and Song 2025).

    With theta = pi t / 2, v_t = (pi / 2) (cos(theta) z - sin(theta) x). If the data have standard deviation 1, so has
    x_t at every time.
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
    """The linear path up to the last time T of a schedule: alpha(t) = T t, gamma(t) = 1 - T t, v_t = T (z - x).

    T is 0.936 for Stable Diffusion. The network was not trained beyond T, and at pure noise an epsilon-prediction
    contains no information about the data. Velocities and mean velocities u = (x_t - x) / t are per unit of this t.

    schedule: the pipeline's.
    """

    kind: Literal["diffusion"] = "diffusion"
    schedule: Schedule | None = Field(default=None, json_schema_extra=PINNED)

    @property
    def sd(self) -> float:
        """1, because the data are in the model's units."""
        return 1.0

    @property
    def known_schedule(self) -> "Schedule":
        """The pipeline's schedule. Raises UserError if there is none."""
        if self.schedule is None:
            raise UserError("path.schedule is null, because the pipeline was not found: set pipeline=DIR")
        return self.schedule

    @property
    def initial_std(self) -> float:
        """The standard deviation of a sampler's first x_t, in units of the noise.

        diffusers starts from variance-preserving noise x_vp = z. The corresponding point of the linear path is
        x_vp sqrt(T^2 + (1 - T)^2).
        """
        last = self.known_schedule.last_time
        return (last * last + (1 - last) ** 2) ** 0.5

    def nearest_net_times(self, times: Sequence[float]) -> list[float]:
        """Return the nearest times at integer indices of the schedule, at which the network was trained.

        `times` must be decreasing. Raises UserError if the schedule has fewer times.
        """
        schedule = self.known_schedule
        return [float(schedule.times[k]) / schedule.last_time for k in self.nearest_indices(times)]

    def nearest_indices(self, times: Sequence[float]) -> list[int]:
        """Return the strictly decreasing indices of the schedule's times nearest to `times`, which must be decreasing.

        If two times are nearest to one entry, the higher time gets a higher entry; if too few entries are left above,
        the lower time gets a lower entry. Raises UserError if the schedule has fewer times.
        """
        schedule = self.known_schedule
        if len(times) > schedule.steps:
            raise UserError(
                f"nfe={len(times)}, but the pipeline's schedule has {schedule.steps} times: set nfe to "
                f"{schedule.steps} or less"
            )
        rising_indices: list[int] = []
        # The lowest and highest index that are available. The times above need entries as well.
        lowest = 0
        for k, t in enumerate(reversed(times)):
            highest = schedule.steps - len(times) + k
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


FlowPath = Annotated[Linear | Trig | Diffusion, Field(discriminator="kind")]
