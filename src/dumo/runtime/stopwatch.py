"""How long work takes on a device.

A GPU computes while Python continues, so `Stopwatch.now` first waits until the device has done all work so far.
`seconds` times one call, and `time_rounds` several tasks in turn; `quartiles` summarises their times. The first rounds
do not count, because they compile, choose kernels and fill caches.
"""

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dumo.runtime.progress import Bar, no_bar

Clock = Callable[[], float]  # seconds, from any beginning
Task = Callable[[], object]
RoundTimes = Float[Tensor, "tasks rounds"]  # seconds

WARM_UP = 2  # rounds before the first that counts: ours

wall_clock: Clock = time.perf_counter


class Stopwatch:
    """Times work on one device."""

    def __init__(self, device: torch.device, clock: Clock = wall_clock) -> None:
        self.device = device
        self.clock = clock

    @classmethod
    def for_bench(cls, device: torch.device) -> "Stopwatch":
        """Return a stopwatch that, on a CPU with one thread, reads processor time, which leaves out other programs."""
        is_single_thread = device.type == "cpu" and torch.get_num_threads() == 1
        return cls(device, time.process_time if is_single_thread else wall_clock)

    def now(self) -> float:
        """Wait until the device has done all work so far, then read the clock, in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return self.clock()

    def seconds(self, task: Task) -> float:
        """Seconds that one call of the task takes."""
        began = self.now()
        task()
        return self.now() - began

    def time_rounds(
        self,
        tasks: Sequence[Task],
        num_rounds: int,
        *,
        warm_up: int = WARM_UP,
        bar: Bar = no_bar,
        title: str = "timing",
    ) -> RoundTimes:
        """Seconds that each task takes in each round, after `warm_up` rounds that do not count.

        The tasks take turns, so that a slow minute slows them alike, and ratios can be taken within a round.
        """
        times = torch.zeros(len(tasks), num_rounds, dtype=torch.float64)
        with bar(title, warm_up + num_rounds) as tick:
            for i in range(warm_up + num_rounds):
                for j, task in enumerate(tasks):
                    seconds = self.seconds(task)
                    if i >= warm_up:
                        times[j, i - warm_up] = seconds
                tick(i + 1, "")
        return times


def quartiles(values: Float[Tensor, " rounds"]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return low, middle, high
