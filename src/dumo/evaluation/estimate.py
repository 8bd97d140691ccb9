"""Numbers with standard errors, and which of them tie with the smallest."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def ties_with_least(estimates: Sequence[Estimate]) -> list[bool]:
    """Whether each estimate exceeds the least by at most two standard errors of their difference."""
    least = min(estimates)
    is_tied: list[bool] = []
    for estimate in estimates:
        error = (estimate.error**2 + least.error**2) ** 0.5
        is_tied.append(estimate.value - least.value <= 2 * error)
    return is_tied


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the unbiased standard deviation of two or more values, in float64."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item()
