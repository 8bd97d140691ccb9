"""Numbers with their uncertainty: an `Estimate`, `ties_with_least` among several, and `mean_sd` of plain numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def ties_with_least(estimates: Sequence[Estimate]) -> list[bool]:
    """Whether each estimate ties with the least: it is at most two standard errors of the difference above it."""
    least = min(estimates)
    is_tied: list[bool] = []
    for estimate in estimates:
        error = (estimate.error**2 + least.error**2) ** 0.5
        is_tied.append(estimate.value - least.value <= 2 * error)
    return is_tied


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sd of values, in float64. The variance is unbiased, so there must be 2 values or more."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item()
