"""Laws of what is drawn for every row: one time or another number, noise, signs.

A law of one time aims at the data, r = 0. Drawn for something else than (t, r), as a share or a knob, it is a number.
"""

from abc import abstractmethod
from collections.abc import Sequence
from math import pi
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator

from dumo.runtime import random
from dumo.types import Law, PerSample, Sample, Time, TimeLaw
from dumo.types.rows import spread

DEVIATION, RHO = 0.5, 7.0  # of data, and rho: EDM (Karras et al. 2022)
ROOTS = 0.002 ** (1 / RHO), 80.0 ** (1 / RHO)  # of its sigma_min and sigma_max


class Noise(Law):
    """N(0, I), shaped like the data: drawn for the rows that are asked for."""

    kind: Literal["noise"] = "noise"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample for each of these rows."""
        return random.keyed(*key, rows=rows, shape=shape)


class Signs(Law):
    """1 or -1 for every number of a sample, as likely: directions of Hutchinson's estimate (`dumo.flow.divergence`)."""

    kind: Literal["signs"] = "signs"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample of signs for each of these rows."""
        return random.signs(*key, rows=rows, shape=shape)


class Number(Law):
    """A number per row, drawn for the whole batch at once."""

    @abstractmethod
    def one(self, n: int, g: Generator) -> PerSample:
        """Draw one number for each of n rows."""

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> PerSample:
        """Draw for all rows of the batch, and keep these."""
        return self.one(batch, random.stream(*key))[rows.start : rows.stop]


class ToData(TimeLaw, Number):
    """A law of one number in [0, 1]; as a law of times every jump goes to the data, r = 0."""

    @property
    def between(self) -> bool:
        """No jump ends before the data."""
        return False

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = self.one(n, g)
        return t, torch.zeros_like(t)


class Beta(ToData):
    """t ~ Beta(a, b): (theta_1, theta_2) of the paper (Sec. 3.3 and Tab. 3)."""

    kind: Literal["beta"] = "beta"
    a: float = Field(default=2.4, gt=0)
    b: float = Field(default=2.4, gt=0)

    def one(self, n: int, g: Generator) -> Time:
        """Draw a ratio of two gamma variables."""
        shape = torch.tensor([self.a, self.b]).expand(n, 2)
        gamma = torch._standard_gamma(shape, generator=g)  # pyright: ignore[reportPrivateImportUsage]
        return gamma[:, 0] / gamma.sum(1)


class Uniform(ToData):
    """t ~ U(low, high); where both are equal, that one time."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Uniform":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t."""
        return self.low + (self.high - self.low) * torch.rand(n, generator=g)


class LogitNormal(ToData):
    """t = sigmoid(N(mean, std^2)) (Esser et al. 2024, Sec. 3.1; mean and std of MeanFlow, Tab. 4)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = -0.4
    std: float = Field(default=1.0, gt=0)

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t."""
        return (self.mean + self.std * torch.randn(n, generator=g)).sigmoid()


class Arctan(ToData):
    """tan(pi t / 2) = exp(N(mean, std^2)) / sd: a log-normal noise level as an angle, in units of a right angle.

    sCM on the trigonometric path (Lu and Song 2025, its Sec. 4), whose data have the standard deviation `sd`; with
    sd = 1, FACM's times of its FM and CM losses (its code, `losses.py`: mean -0.8, std 1.6).
    """

    kind: Literal["arctan"] = "arctan"
    mean: float = -1.0
    std: float = Field(default=1.4, gt=0)
    sd: float = Field(default=DEVIATION, gt=0)

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t."""
        normal = torch.randn(n, generator=g)
        return ((self.mean + self.std * normal).exp() / self.sd).atan() * 2 / pi


class Karras(ToData):
    """The time of a noise level sigma with sigma^(1 / rho) uniform from sigma_min to sigma_max.

    The levels of Karras et al. (2022), Eq. 5, in the limit of many: CM (Song et al. 2023) takes each as often.
    """

    kind: Literal["karras"] = "karras"

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t."""
        low, high = ROOTS
        return karras(low + (high - low) * torch.rand(n, generator=g))


def karras(root: PerSample) -> Time:
    """t = s / (1 + s), s = sigma / sd, of the noise level whose root sigma^(1 / rho) this is (Eq. 5)."""
    s = root**RHO / DEVIATION
    return s / (1 + s)


def root(t: Time) -> PerSample:
    """The root of the noise level of t: `karras`, inverted."""
    return (DEVIATION * t / (1 - t)) ** (1 / RHO)


One = Annotated[Arctan | Beta | Karras | LogitNormal | Uniform, Field(discriminator="kind")]


class Atom(ToData):
    """One law, but t = `at` on a share of the rows, evenly spread: TCM's boundary (Lee et al. 2025, its p)."""

    kind: Literal["atom"] = "atom"
    of: One = Beta()
    share: float = Field(default=0.15, ge=0, le=1)
    at: float = Field(default=1.0, ge=0, le=1)

    def one(self, n: int, g: Generator) -> Time:
        """Draw n times t."""
        return self.of.one(n, g).masked_fill(torch.tensor(spread(n, self.share), dtype=torch.bool), self.at)
