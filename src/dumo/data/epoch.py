"""Which rows a step sees: endless, without state, so that a run resumes by its step number alone."""

import torch
from jaxtyping import Bool
from torch import Tensor

from dumo.random import stream


def rows_of(step: int, batch: int, *, size: int, seed: int) -> Tensor:
    """Row numbers (batch,) of a global step, out of `size`: each epoch is one keyed permutation, laid end to end."""
    place = torch.arange(step * batch, (step + 1) * batch)
    epochs = (place // size).unique()
    orders = {int(e): torch.randperm(size, generator=stream(seed, "epoch", int(e))) for e in epochs}
    return torch.cat([orders[int(e)][place[place // size == e] % size] for e in epochs])


def mirrored(step: int, batch: int, seed: int) -> Bool[Tensor, " b"]:
    """Which rows of a global step's batch are mirrored: each with probability 1/2."""
    return torch.rand(batch, generator=stream(seed, step, "flip")) < 0.5
