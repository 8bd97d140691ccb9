"""Two neighbouring times r < t on the way to the data, ever closer together as the training goes on.

Discrete consistency models compare what a net makes of two points of one trajectory. Their authors speak of noise
levels, y = x + sigma z with data of standard deviation `sd`; in units of it x_t = (1 - t) y, t / (1 - t) = sigma / sd.
All discretizations take t and the share of the training that is done; they return t, which may move, and r.
"""

from math import ceil, log2
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from dumo.bound import FACTOR, STEPS
from dumo.types import Spec, Time


class Ratio(Spec):
    """sigma_r = sigma_t max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-sigma_t))): the mapping of ECT (Geng et al. 2025).

    Times stay as they are drawn. At first, with q = 2, most of them have r = 0, which is flow matching.
    """

    kind: Literal["ratio"] = "ratio"
    # The authors' `training/loss.py`; with stages = 1, 256: their quick run.
    q: float = Field(default=2.0, gt=1, le=FACTOR)
    stages: int = Field(default=8, ge=1, le=STEPS)  # 200,000 steps, the next stage after 25,000 (`run_ecm.sh`)
    k: float = Field(default=8.0, ge=0, le=FACTOR)  # how much longer a step is near the data
    sd: float = Field(default=0.5, gt=0)  # of the data that k is meant for

    def __call__(self, t: Time, progress: float) -> tuple[Time, Time]:
        """Return t and r; r < t, but r = t at t = 0, and at t = 1 unless r = 0."""
        stage = min(int(progress * self.stages), self.stages - 1)
        left = (1 - self.q ** -(stage + 1) * (1 + self.k * (-self.sd * t / (1 - t)).sigmoid())).clamp(min=0)
        return t, left * t / (1 - t + left * t).clamp(min=1e-12)


class KarrasGrid(Spec):
    """The levels of Karras et al. (2022), Eq. 5: t goes up to the end of its step, and r is where the step begins.

    The lowest level is 0, where a consistency model is the identity; theirs is `low`, with an identity made for it.
    Each step gets the share of the rows that t's law has between its ends. So a log-normal is iCT's discretised one
    (Song and Dhariwal 2024, Sec. 3.5), but for the 0.8 % beyond `low` and `high`, which the outermost steps take.
    """

    kind: Literal["grid"] = "grid"
    growth: Literal["double", "root"] = "double"  # of the number of steps: iCT's (its Sec. 3.4), CM's (its App. C)
    first: int = Field(default=10, ge=1, le=STEPS)  # s_0 and s_1 of these; of iCT
    last: int = Field(default=1280, ge=1, le=STEPS)
    low: float = Field(default=0.002, gt=0)  # EDM
    high: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, ge=1)
    sd: float = Field(default=0.5, gt=0)  # of the data that `low` and `high` are meant for

    @model_validator(mode="after")
    def _ordered(self) -> "KarrasGrid":
        for name, low, high in (("first", self.first, self.last), ("low", self.low, self.high)):
            if low > high or (name == "low" and low == high):
                raise ValueError(f"{name} ({low}) must not be above {'last' if name == 'first' else 'high'} ({high})")
        return self

    def steps(self, progress: float) -> int:
        """How many steps there are from the highest level to the lowest."""
        if self.growth == "root":
            whole = (self.last + 1) ** 2 - self.first**2
            return max(1, ceil((progress * whole + self.first**2) ** 0.5 - 1))
        return min(self.first * 2 ** int(progress * (log2(self.last / self.first) + 1)), self.last)

    def __call__(self, t: Time, progress: float) -> tuple[Time, Time]:
        """Return the ends of the step that t falls into."""
        low, high, n = self.low ** (1 / self.rho), self.high ** (1 / self.rho), self.steps(progress)
        place = ((self.sd * t / (1 - t)) ** (1 / self.rho) - low) / (high - low)
        i = (place * n).floor().clamp(0, n - 1)

        def level(i: Time) -> Time:
            s = (low + (high - low) * i / n) ** self.rho / self.sd
            return s / (1 + s)

        return level(i + 1), torch.where(i > 0, level(i), 0.0)


Discretization = Annotated[KarrasGrid | Ratio, Field(discriminator="kind")]
