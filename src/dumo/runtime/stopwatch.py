"""How long work takes on a device: `Stopwatch`, the one clock of rehearsals, benches, trials and speeds.

A GPU works on while Python goes on, so its time is read when all work so far is done. What runs for the first time
compiles, chooses kernels and fills caches: those rounds do not count.
"""

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dumo.runtime.progress import Bar, no_bar

Clock = Callable[[], float]  # seconds, from any beginning
Work = Callable[[], object]
Times = Float[Tensor, "works rounds"]  # seconds

WARM_UP = 2  # rounds before the first that counts: ours

wall_clock: Clock = time.perf_counter


class Stopwatch:
    """Times work on one device."""

    def __init__(self, device: torch.device, clock: Clock = wall_clock) -> None:
        self.device = device
        self.clock = clock

    @classmethod
    def for_bench(cls, device: torch.device) -> "Stopwatch":
        """With one thread on a CPU, by the processor's time, which leaves out what other programs take."""
        is_single_thread = device.type != "cuda" and torch.get_num_threads() == 1
        return cls(device, time.process_time if is_single_thread else wall_clock)

    def now(self) -> float:
        """Seconds, when all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def seconds(self, work: Work) -> float:
        """Seconds that one call of `work` takes."""
        began = self.now()
        work()
        return self.now() - began

    def rounds(
        self,
        works: Sequence[Work],
        rounds: int,
        *,
        warm_up: int = WARM_UP,
        bar: Bar = no_bar,
        title: str = "timing",
    ) -> Times:
        """Seconds that each piece of work takes in each round, after `warm_up` rounds that do not count.

        All pieces take turns, so that a slow minute slows them alike, and a ratio is taken within a round.
        """
        times = torch.zeros(len(works), rounds, dtype=torch.float64)
        with bar(title, warm_up + rounds) as tick:
            for i in range(warm_up + rounds):
                for j, work in enumerate(works):
                    seconds = self.seconds(work)
                    if i >= warm_up:
                        times[j, i - warm_up] = seconds
                tick(i + 1, "")
        return times

    def repeat(self, work: Work, duration: float) -> list[float]:
        """Seconds of each call of `work`, which is called again and again for `duration` seconds."""
        times: list[float] = []
        began = self.now()
        deadline = began + duration
        while began < deadline:
            work()
            ended = self.now()
            times.append(ended - began)
            began = ended
        return times


def quartiles(values: Float[Tensor, " rounds"]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return low, middle, high
