"""Batches and random numbers of later steps, made by threads while the present step runs: `Prefetch`."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
# Batches that are made ahead of the step, each by a thread. One hides a late file; more hide an epoch's slow start.
BATCHES_AHEAD = 3  # ours


class Prefetch(Generic[T]):
    """Calls `make(step)` ahead of use, in `depth` threads: asking for step s starts s + 1 ... s + depth.

    Any step may be asked for; errors of `make` are raised at its step. At the end of its `with` no thread is left.
    """

    def __init__(self, make: Callable[[int], T], *, last: int, depth: int = 1) -> None:
        """Start nothing yet. Step `last` and later ones are never made ahead."""
        self.make = make
        self.last = last
        self.depth = depth
        torch.get_num_threads()  # settles this thread's number of OpenMP threads: threads begun later would have 1
        # Each thread here has one OpenMP thread. A team of them would take the cores from the step, which on two cores
        # took 1.4 to 1.7 times as long.
        self.executor = ThreadPoolExecutor(depth, "ahead", initializer=torch.set_num_threads, initargs=(1,))
        self.futures: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        """Wait for the value of `make(step)`, and return it. Raises what `make` raised."""
        future = self.futures.pop(step, None)
        if future is None:
            future = self.executor.submit(self.make, step)
        next_steps = range(step + 1, min(step + 1 + self.depth, self.last))
        for other in self.futures.keys() - set(next_steps):
            self.futures.pop(other).cancel()
        for other in next_steps:
            if other not in self.futures:
                self.futures[other] = self.executor.submit(self.make, other)
        return future.result()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.futures.clear()
        self.executor.shutdown(cancel_futures=True)
