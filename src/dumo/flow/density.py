"""Laws of one time t, the same for every row; r = 0. They have a quantile function, so draws may be stratified."""

from abc import abstractmethod
from math import pi
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator

from dumo.types import PerSample, Time, TimeLaw


class ToData(TimeLaw):
    """A law of one time: every jump goes to the data, r = 0."""

    @property
    def between(self) -> bool:
        """None."""
        return False


class Density(ToData):
    """What each of these laws can tell. It is drawn by that, unless it says otherwise."""

    @abstractmethod
    def quantile(self, p: PerSample) -> Time:
        """The time below which a share p in [0, 1] of the draws lies."""

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = self.quantile(torch.rand(n, generator=g))
        return t, torch.zeros_like(t)


class Normal(Density):
    """A rising function of a normal variable."""

    @abstractmethod
    def at(self, normal: PerSample) -> Time:
        """The time of a draw of N(0, 1)."""

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = self.at(torch.randn(n, generator=g))
        return t, torch.zeros_like(t)

    def quantile(self, p: PerSample) -> Time:
        """Of a normal quantile."""
        return self.at(torch.special.ndtri(p))


class Beta(Density):
    """t ~ Beta(a, b), r = 0: (theta_1, theta_2) of the paper (Sec. 3.3 and Tab. 3)."""

    kind: Literal["beta"] = "beta"
    a: float = Field(default=2.4, gt=0)
    b: float = Field(default=2.4, gt=0)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows, as a ratio of two gamma variables."""
        shape = torch.tensor([self.a, self.b]).expand(n, 2)
        gamma = torch._standard_gamma(shape, generator=g)  # pyright: ignore[reportPrivateImportUsage]
        t = gamma[:, 0] / gamma.sum(1)
        return t, torch.zeros_like(t)

    def quantile(self, p: PerSample) -> Time:
        """The inverse of the regularized incomplete beta function, by scipy."""
        from scipy.special import betaincinv  # slow to import

        return torch.tensor(betaincinv(self.a, self.b, p.numpy()), dtype=p.dtype)


class Uniform(Density):
    """t ~ U(low, high), r = 0; where both are equal, that one time."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Uniform":
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self

    def quantile(self, p: PerSample) -> Time:
        """Linear."""
        return self.low + (self.high - self.low) * p


class LogitNormal(Normal):
    """t = sigmoid(N(mean, std^2)), r = 0 (Esser et al. 2024, Sec. 3.1; mean and std of MeanFlow, Tab. 4)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = -0.4
    std: float = Field(default=1.0, gt=0)

    def at(self, normal: PerSample) -> Time:
        """As the class says."""
        return (self.mean + self.std * normal).sigmoid()


class Arctan(Normal):
    """tan(pi t / 2) = exp(N(mean, std^2)) / sd, r = 0: a log-normal noise level as an angle, in units of a right angle.

    sCM on the trigonometric path (Lu and Song 2025, its Sec. 4), whose data have the standard deviation `sd`; with
    sd = 1, FACM's times of its FM and CM losses (its code, `losses.py`: mean -0.8, std 1.6).
    """

    kind: Literal["arctan"] = "arctan"
    mean: float = -1.0
    std: float = Field(default=1.4, gt=0)
    sd: float = Field(default=0.5, gt=0)

    def at(self, normal: PerSample) -> Time:
        """As the class says."""
        return ((self.mean + self.std * normal).exp() / self.sd).atan() * 2 / pi


class Karras(Density):
    """t = s / (1 + s), with s = sigma / sd and sigma^(1 / rho) uniform from `low` to `high`; r = 0.

    The noise levels of Karras et al. (2022), Eq. 5, in the limit of many: so are those of CM (Song et al. 2023) spread.
    """

    kind: Literal["karras"] = "karras"
    low: float = Field(default=0.002, gt=0)
    high: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, ge=1)
    sd: float = Field(default=0.5, gt=0)  # of the data that `low` and `high` are meant for

    @model_validator(mode="after")
    def _ordered(self) -> "Karras":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    def quantile(self, p: PerSample) -> Time:
        """As `low` and `high` are p apart."""
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        s = (low + (high - low) * p) ** self.rho / self.sd
        return s / (1 + s)


One = Annotated[Arctan | Beta | Karras | LogitNormal | Uniform, Field(discriminator="kind")]


class Stratified(ToData):
    """One of these laws, whose n draws lie one in each of n parts of equal probability, in random order; r = 0.

    Each row keeps the law, so a loss has the same mean, and less noise from times that crowd by chance (stratified
    sampling; Kingma et al. 2021, App. I.1, space theirs evenly for it). Of rows drawn together: the whole batch, or
    all rows of one kind.
    """

    kind: Literal["stratified"] = "stratified"
    of: One = LogitNormal()

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        p = (torch.randperm(n, generator=g) + torch.rand(n, generator=g, dtype=torch.float64)) / n
        t = self.of.quantile(p).float()
        return t, torch.zeros_like(t)


Alike = Annotated[Arctan | Beta | Karras | LogitNormal | Stratified | Uniform, Field(discriminator="kind")]
