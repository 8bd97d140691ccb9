"""Laws: what is drawn per row. A law of times gives (t, r) with r <= t; any other law gives one tensor.

Laws of one time aim at the data: r = 0.
"""

from math import log
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from dumo.types import Spec, Time


class Beta(Spec):
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


class Uniform(Spec):
    """t ~ U(low, high), r = 0."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Uniform":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = self.low + (self.high - self.low) * torch.rand(n, generator=g)
        return t, torch.zeros_like(t)


class LogitNormal(Spec):
    """t = sigmoid(N(mean, std^2)), r = 0 (Esser et al. 2024, Sec. 3.1; mean and std of MeanFlow, Tab. 4)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = -0.4
    std: float = Field(default=1.0, gt=0)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = (self.mean + self.std * torch.randn(n, generator=g)).sigmoid()
        return t, torch.zeros_like(t)


class Pair(Spec):
    """Two draws of one law, sorted, so that r <= t; on a share `velocity_ratio` of the rows r = t (MeanFlow, Sec. 4.3).

    This is rho of the paper's Eq. 5. The rows are chosen by their place in the batch, evenly spread, not by a coin
    (ours): so every rank and every step has the same number of them.
    """

    kind: Literal["pair"] = "pair"
    of: Annotated[Beta | Uniform | LogitNormal, Field(discriminator="kind")] = LogitNormal()
    velocity_ratio: float = Field(default=0.75, ge=0, le=1)

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        (a, _), (b, _) = self.of(n, g), self.of(n, g)
        t, r = torch.maximum(a, b), torch.minimum(a, b)
        return t, torch.where(torch.tensor(self.moving(n)), r, t)

    def moving(self, n: int) -> tuple[bool, ...]:
        """Which of the first n rows may have r < t, by their place alone; all others have r = t."""
        so_far = (torch.arange(n + 1, dtype=torch.float64) * self.velocity_ratio + 1e-9).floor()
        return tuple((so_far.diff() == 0).tolist())


Times = Annotated[Beta | Uniform | LogitNormal | Pair, Field(discriminator="kind")]


class Noise(Spec):
    """N(0, I), shaped like the data."""

    kind: Literal["noise"] = "noise"

    def __call__(self, shape: torch.Size, g: Generator) -> Tensor:
        """Draw one sample per row of `shape`."""
        return torch.randn(shape, generator=g)


class Level(Spec):
    """One number per row: uniform in [low, high], or log-uniform; for knobs that a net learns to be set by."""

    kind: Literal["level"] = "level"
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Level":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"log-uniform numbers are positive: low is {self.low}")
        return self

    def __call__(self, shape: torch.Size, g: Generator) -> Tensor:
        """Draw one number per row of `shape`."""
        share = torch.rand(shape[0], generator=g)
        if self.log:
            return self.low * (share * log(self.high / self.low)).exp()
        return self.low + (self.high - self.low) * share


LAWS = (Noise, Level)  # fields of an objective that have one of these types are drawn into `Noised.drawn`
