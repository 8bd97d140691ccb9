"""Values made ahead of the steps that take them, so that a device does not wait for what a CPU makes.

For what is a function of the step alone: then who makes it, and when, changes nothing in it.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
BATCHES = (
    3  # of data, ahead of the step, each made by a thread: ours. One hides a late file, more a slow epoch's beginning
)


class Prefetch(Generic[T]):
    """`make(step)` for steps that are asked for in their order: the next `depth` are begun before, each in a thread.

    Another step than the next may be asked for; then what comes after that is made. What `make` raises for a step is
    raised where that step is asked for. At its end no thread is left.
    """

    def __init__(self, make: Callable[[int], T], *, last: int, depth: int = 1) -> None:
        """Begin nothing yet. Nothing is made ahead for step `last` or later ones."""
        self.make, self.last, self.depth = make, last, depth
        self.threads = ThreadPoolExecutor(depth, thread_name_prefix="ahead")
        self.coming: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        """The value of a step."""
        now = self.coming.pop(step, None) or self.threads.submit(self.make, step)
        wanted = range(step + 1, min(step + 1 + self.depth, self.last))
        for other in self.coming.keys() - set(wanted):
            self.coming.pop(other).cancel()
        for other in wanted:
            if other not in self.coming:
                self.coming[other] = self.threads.submit(self.make, other)
        return now.result()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.coming.clear()
        self.threads.shutdown(cancel_futures=True)
