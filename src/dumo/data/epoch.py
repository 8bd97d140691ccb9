"""Which rows a step sees: endless, without state, so that a run resumes by its step number alone."""

from functools import lru_cache
from threading import Lock

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dumo.random import stream

ORDERS = 2  # kept: batches are made ahead across the end of an epoch. Ours
_LOCK = Lock()  # a cache alone would let two threads make one order each


def rows_of(step: int, batch: int, *, size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"]:
    """Row numbers (b,) of a global step, out of `size`: each epoch is one keyed permutation, laid end to end.

    Those of the places `rows` of the global batch.
    """
    place = torch.arange(step * batch, (step + 1) * batch)[rows]
    epoch, found = place // size, torch.empty_like(place)
    for e in epoch.unique().tolist():
        here = epoch == e
        found[here] = _order(size, seed, e)[place[here] % size]
    return found


def mirrored(step: int, batch: int, seed: int, rows: slice = slice(None)) -> Bool[Tensor, " b"]:
    """Which of the rows `rows` of a global step's batch are mirrored: each with probability 1/2."""
    return (torch.rand(batch, generator=stream(seed, step, "flip")) < 0.5)[rows]


def _order(size: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """An epoch's order, made once: of millions of rows it takes longer than a step."""
    with _LOCK:
        return _permuted(size, seed, epoch)


@lru_cache(ORDERS)
def _permuted(size: int, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    return torch.randperm(size, generator=stream(seed, "epoch", epoch))
