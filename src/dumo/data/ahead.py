"""Batches made ahead of the steps that take them, so that a device need not wait for its data.

A batch is a function of its step alone, so who makes it, and when, changes nothing in it. Some threads make the next
ones whole: read, decoded, mirrored, drawn, and, where the device is a GPU, moved to it from pinned memory on a stream
of their own. As many are kept as threads make, so memory is bounded.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

DEPTH = 3  # batches made ahead, each by a thread: ours. One hides a late file, more a slow epoch's beginning


class Made(NamedTuple):
    """A batch on the device, and what to wait for before it is there."""

    parts: list[Tensor]
    event: torch.cuda.Event | None


class Ahead:
    """`make(step)` on a device, for steps that are asked for in their order: the next are begun before they are.

    Another step than the next may be asked for, such as an earlier one; then what comes after that is made. What `make`
    raises for a step is raised, as it is, where that step is asked for. At its end no thread is left.
    """

    def __init__(
        self, make: Callable[[int], Sequence[Tensor]], device: torch.device, *, last: int, depth: int = DEPTH
    ) -> None:
        """`last`: the step before which all end; nothing is made for it or later ones."""
        self.make, self.device, self.last, self.depth = make, device, last, depth
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.threads = ThreadPoolExecutor(depth, thread_name_prefix="ahead")
        self.coming: dict[int, Future[Made]] = {}

    def __call__(self, step: int) -> list[Tensor]:
        """The batch of a step."""
        wanted = range(step, max(step + 1, min(step + 1 + self.depth, self.last)))
        for other in self.coming.keys() - set(wanted):
            self.coming.pop(other).cancel()
        for other in wanted:
            if other not in self.coming:
                self.coming[other] = self.threads.submit(self._made, other)
        made = self.coming.pop(step).result()
        if made.event is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(made.event)
            for part in made.parts:
                part.record_stream(here)  # its memory is not given to another batch before this stream has read it
        return made.parts

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.coming.clear()
        self.threads.shutdown(cancel_futures=True)

    def _made(self, step: int) -> Made:
        batch = self.make(step)
        if self.stream is None:
            return Made([part.to(self.device) for part in batch], None)
        with torch.cuda.stream(self.stream):
            parts = [part.pin_memory().to(self.device, non_blocking=True) for part in batch]
            (event := torch.cuda.Event()).record(self.stream)
            return Made(parts, event)
