"""The noise schedule of a diffusion model: `Schedule`, a table of times, and `TimeToIndex`, which interpolates it.

A diffusion model is trained at x_vp = a x + s z, a^2 + s^2 = 1, at integer indices k = 0 .. steps - 1 of a table of
s_k. Divided by a + s, this is a point of the linear path,

    x_t = (1 - t) x + t z,   t = s / (a + s),   x_vp = x_t / n,   n = 1 / (a + s) = (t^2 + (1 - t)^2)^(1/2),

so that scale and signal are functions of t. `Schedule` provides the table of the t_k, in float64 on the CPU, for paths
and solvers. `TimeToIndex` is a module of networks that were trained on indices: it maps t to k. It is a monotone cubic
between the entries (Fritsch and Carlson 1980, by scipy), linear beyond them, and continuously differentiable.
"""

from functools import lru_cache
from math import cos, pi
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dumo.autodiff.dual import primal
from dumo.runtime.limits import PASSES
from dumo.types import Array, Spec, Time

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


class Schedule(Spec):
    """A diffusers beta schedule: k runs from 0 to steps - 1, and a_k^2 = prod (1 - beta_i)."""

    kind: BetaSchedule
    # The first and the last beta, by default those of DDPM (Ho et al. 2020).
    start: float = Field(default=0.0001, gt=0, lt=1)
    end: float = Field(default=0.02, gt=0, lt=1)
    steps: int = Field(default=1000, ge=2, le=PASSES)
    # Rescale so that the last entry is pure noise (Lin et al. 2023, arXiv 2305.08891).
    zero_snr: bool = False

    @property
    def times(self) -> np.ndarray:
        """t_k, (steps,), increasing, in float64."""
        return _time_table(self.kind, self.start, self.end, self.steps, self.zero_snr)

    @property
    def last_time(self) -> float:
        """The last time of the table; it is below 1 unless the last entry is pure noise."""
        return float(self.times[-1])

    def nearest_index(self, t: float) -> int:
        """Return the index of the entry nearest to time t."""
        return int(np.abs(self.times - t).argmin())


@lru_cache(16)
def _time_table(kind: BetaSchedule, low: float, high: float, n: int, zero_snr: bool) -> np.ndarray:
    """Compute the n times of a schedule with betas from low to high, (n,)."""
    match kind:
        case "linear":
            betas = np.linspace(low, high, n)
        case "scaled_linear":
            betas = np.linspace(low**0.5, high**0.5, n) ** 2
        case "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, Eq. 17, with their constants 0.008 and 0.999
            bars = [cos((k / n + 0.008) / 1.008 * pi / 2) ** 2 for k in range(n + 1)]
            betas = np.minimum(1 - np.divide(bars[1:], bars[:-1]), 0.999)
    signal = np.cumprod(1 - betas) ** 0.5
    if zero_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    noise = (1 - signal**2) ** 0.5
    return noise / (signal + noise)


class TimeToIndex(nn.Module):
    """The index of a schedule as a piecewise polynomial of t. Its buffers are not in the state_dict.

    The pieces are a line below the first time, a cubic between neighbouring times, and a line above the last.

    knots: (steps,), the times between the pieces.
    origins: (steps + 1,), the time at which the polynomial variable of each piece is zero.
    coefficients: (steps + 1, 4), the coefficients of each piece, highest power first.
    """

    knots: Tensor
    origins: Tensor
    coefficients: Tensor

    def __init__(self, schedule: Schedule) -> None:
        """Compute the coefficients in float64, whatever the dtype of the network."""
        from scipy.interpolate import PchipInterpolator  # slow to import

        super().__init__()
        times = schedule.times
        index = np.arange(schedule.steps, dtype=np.float64)
        curve = PchipInterpolator(times, index)
        first_slope, last_slope = curve(times[[0, -1]], 1)
        line_below = [0, 0, first_slope, index[0]]
        line_above = [0, 0, last_slope, index[-1]]
        coefficients = np.concatenate([[line_below], curve.c.T, [line_above]])
        origins = np.concatenate([times[:1], times])
        self.max_slope = float(curve.derivative()(np.linspace(times[0], times[-1], 10_001)).max())
        for name, values in (("knots", times), ("origins", origins), ("coefficients", coefficients)):
            self.register_buffer(name, torch.as_tensor(values), persistent=False)

    def forward(self, t: Time) -> Array:
        """Return the index at times t, (b,), which may be Duals."""
        k = torch.searchsorted(self.knots.to(t.dtype), primal(t).detach().contiguous(), right=True)
        cubic, square, slope, index = self.coefficients.to(t.dtype)[k].unbind(1)
        d = t - self.origins.to(t.dtype)[k]
        return ((cubic * d + square) * d + slope) * d + index
