"""Prefetch the batches and random numbers of later steps in threads while the current step runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
# The number of prefetched batches, each read by a thread. One hides a slow file; more hide the slow start of an epoch.
BATCHES_AHEAD = 3


class Prefetch(Generic[T]):
    """Calls `make(step)` ahead of use in `depth` threads: a call for step s starts s + 1 ... s + depth.

    Steps may be requested in any order, and errors of `make` are raised at their step. Exiting the context joins the
    threads.
    """

    def __init__(self, make: Callable[[int], T], *, last: int, depth: int = 1) -> None:
        """Create the threads. Step `last` and later steps are never prefetched."""
        self.make = make
        self.last = last
        self.depth = depth
        # Initialize this thread's number of OpenMP threads before the pool sets it to 1 for later threads.
        torch.get_num_threads()
        # Use one OpenMP thread per worker: more would take cores from the step, which on two cores took 1.4 to 1.7
        # times as long.
        self.executor = ThreadPoolExecutor(depth, "ahead", initializer=torch.set_num_threads, initargs=(1,))
        self.futures: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        """Wait for `make(step)`, and return its value or raise its error."""
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
