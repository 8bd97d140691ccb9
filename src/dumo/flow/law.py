"""Laws other than of times: what an objective has drawn for every row beside (t, r)."""

from abc import ABC, abstractmethod
from math import log
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor

from dumo.types import Spec


class Law(Spec, ABC):
    """A field of an objective that is one is drawn into `Noised.drawn`, by the field's name."""

    @abstractmethod
    def __call__(self, shape: torch.Size, g: Generator) -> Tensor:
        """Draw for rows of samples of this shape: a number each, or a sample each."""


class Noise(Law):
    """N(0, I), shaped like the data."""

    kind: Literal["noise"] = "noise"

    def __call__(self, shape: torch.Size, g: Generator) -> Tensor:
        """Draw one sample per row of `shape`."""
        return torch.randn(shape, generator=g)


class Level(Law):
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

    def demand_share(self, name: str) -> None:
        """Raise ValueError for numbers beyond [0, 1], where field `name` is a time or a share."""
        if self.low < 0 or self.high > 1:
            raise ValueError(f"{name} is in [0, 1], not in [{self.low:g}, {self.high:g}]")


class Logistic(Law):
    """One number per row: sigmoid(N(mean, std^2)); for a time beside (t, r)."""

    kind: Literal["logistic"] = "logistic"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)

    def __call__(self, shape: torch.Size, g: Generator) -> Tensor:
        """Draw one number per row of `shape`."""
        return (self.mean + self.std * torch.randn(shape[0], generator=g)).sigmoid()
