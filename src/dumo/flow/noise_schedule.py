"""The noise schedule of a diffusion: `Schedule`, a table of times, and `Clock`, which interpolates its index.

A diffusion is trained at x_vp = a x + s z, a^2 + s^2 = 1, at whole indices k = 0 .. steps - 1 of a table of s_k.
Divided by a + s this is a point of the linear path,

    x_t = (1 - t) x + t z,   t = s / (a + s),   x_vp = x_t / n,   n = 1 / (a + s) = (t^2 + (1 - t)^2)^(1/2),

so that scale and signal are functions of t. `Schedule` has the table of the t_k, in float64 on the CPU; paths and
solvers read it. `Clock` is a part of nets that were trained on indices: it goes back from t to k. Between the entries
it is a monotone cubic (Fritsch and Carlson 1980, by scipy), beyond them a straight line, and once continuously
differentiable everywhere.
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

Law = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


class Schedule(Spec):
    """The betas of a diffusion, by a law of diffusers: k runs from 0 to steps - 1, and a_k^2 = prod (1 - beta_i)."""

    kind: Law
    start: float = Field(default=0.0001, gt=0, lt=1)  # the first beta; it and the last as in DDPM (Ho et al. 2020)
    end: float = Field(default=0.02, gt=0, lt=1)  # the last beta
    steps: int = Field(default=1000, ge=2, le=PASSES)
    zero_snr: bool = False  # rescaled, so that the last entry is noise alone (Lin et al. 2023, arXiv 2305.08891)

    @property
    def times(self) -> np.ndarray:
        """t_k, (steps,), rising, in float64."""
        return _time_table(self.kind, self.start, self.end, self.steps, self.zero_snr)

    @property
    def last_time(self) -> float:
        """The last time of the table, below 1 where some of the data is left."""
        return float(self.times[-1])

    def nearest_index(self, t: float) -> int:
        """The index of the entry nearest to time t."""
        return int(np.abs(self.times - t).argmin())


@lru_cache(16)
def _time_table(kind: Law, low: float, high: float, n: int, zero_snr: bool) -> np.ndarray:
    """The n times of a schedule whose betas run from low to high, (n,); cached, for `times` asks again and again."""
    match kind:
        case "linear":
            betas = np.linspace(low, high, n)
        case "scaled_linear":
            betas = np.linspace(low**0.5, high**0.5, n) ** 2
        case "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, Eq. 17: 0.008 and 0.999 are theirs
            bars = [cos((k / n + 0.008) / 1.008 * pi / 2) ** 2 for k in range(n + 1)]
            betas = np.minimum(1 - np.divide(bars[1:], bars[:-1]), 0.999)
    signal = np.cumprod(1 - betas) ** 0.5
    if zero_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    noise = (1 - signal**2) ** 0.5
    return noise / (signal + noise)


class Clock(nn.Module):
    """The index of a schedule as a function of t. Its numbers are no weights, and in no state_dict.

    It is piecewise: a line below the first time, a cubic between each two times, a line above the last.
    """

    ends: Tensor  # (steps,): the times where one piece ends and the next begins
    bases: Tensor  # (steps + 1,): the time from which each piece counts
    pieces: Tensor  # (steps + 1, 4): the coefficients of each piece's cubic, the highest power first

    def __init__(self, schedule: Schedule) -> None:
        """Make the pieces in float64, whatever type the net has."""
        from scipy.interpolate import PchipInterpolator  # slow to import

        super().__init__()
        times = schedule.times
        index = np.arange(schedule.steps, dtype=np.float64)
        curve = PchipInterpolator(times, index)
        first_slope, last_slope = curve(times[[0, -1]], 1)  # the first derivative there
        line_below = [0, 0, first_slope, index[0]]
        line_above = [0, 0, last_slope, index[-1]]
        pieces = np.concatenate([[line_below], curve.c.T, [line_above]])
        bases = np.concatenate([times[:1], times])
        self.fastest = float(curve.derivative()(np.linspace(times[0], times[-1], 10_001)).max())  # in indices per t
        for name, values in (("ends", times), ("bases", bases), ("pieces", pieces)):
            self.register_buffer(name, torch.as_tensor(values), persistent=False)

    def forward(self, t: Time) -> Array:
        """The index at times t, (b,), which may be Duals."""
        k = torch.searchsorted(self.ends.to(t.dtype), primal(t).detach().contiguous(), right=True)
        cubic, square, slope, index = self.pieces.to(t.dtype)[k].unbind(1)
        d = t - self.bases.to(t.dtype)[k]
        return ((cubic * d + square) * d + slope) * d + index
