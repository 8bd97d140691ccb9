"""Laws other than of times: what an objective has drawn for every row beside (t, r)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import log
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Generator

from dumo.random import keyed, signs, stream
from dumo.types import PerSample, Sample, Spec


class Law(Spec, ABC):
    """A field of an objective that is one is drawn into `Noised.drawn`, by the field's name."""

    @abstractmethod
    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample | PerSample:
        """Draw for these rows, of samples of this shape, in a batch of `batch`: the same whatever others are asked for.

        The key is that of `dumo.random`.
        """


class Number(Law):
    """A number per row: drawn for the whole batch at once, of which a caller gets its rows."""

    @abstractmethod
    def __call__(self, n: int, g: Generator) -> PerSample:
        """Draw one number for each of n rows."""

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> PerSample:
        """Draw for all rows of the batch, and keep these."""
        return self(batch, stream(*key))[rows.start : rows.stop]


class Noise(Law):
    """N(0, I), shaped like the data: drawn for the rows that are asked for."""

    kind: Literal["noise"] = "noise"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample for each of these rows."""
        return keyed(*key, rows=rows, shape=shape)


class Signs(Law):
    """1 or -1 for every number of a sample, as likely: directions of Hutchinson's estimate (`dumo.flow.divergence`)."""

    kind: Literal["signs"] = "signs"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> Sample:
        """Draw one sample of signs for each of these rows."""
        return signs(*key, rows=rows, shape=shape)


class Level(Number):
    """Uniform in [low, high], or log-uniform; for knobs that a net learns to be set by."""

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

    def __call__(self, n: int, g: Generator) -> PerSample:
        """Draw n numbers."""
        share = torch.rand(n, generator=g)
        if self.log:
            return self.low * (share * log(self.high / self.low)).exp()
        return self.low + (self.high - self.low) * share

    def demand_share(self, name: str) -> None:
        """Raise ValueError for numbers beyond [0, 1], where field `name` is a time or a share."""
        if self.low < 0 or self.high > 1:
            raise ValueError(f"{name} is in [0, 1], not in [{self.low:g}, {self.high:g}]")


class Logistic(Number):
    """The sigmoid of N(mean, std^2); for a time beside (t, r)."""

    kind: Literal["logistic"] = "logistic"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)

    def __call__(self, n: int, g: Generator) -> PerSample:
        """Draw n numbers."""
        return (self.mean + self.std * torch.randn(n, generator=g)).sigmoid()
