"""Work is timed by one clock, here of the test's own."""

import time
from collections.abc import Callable

import pytest
import torch

from dumo.runtime.stopwatch import WARM_UP, Stopwatch, quartiles, wall_clock

CPU = torch.device("cpu")


class Time:
    """A clock that work moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        """Work that takes `seconds` of how often it was done before."""

        def run() -> None:
            self.now += seconds(self.order.count(name))
            self.order.append(name)

        return run


def test_tasks_take_turns_and_the_first_rounds_do_not_count() -> None:
    clock = Time()
    tasks = [clock.work("a", lambda i: 100 if i < WARM_UP else i), clock.work("b", lambda i: 2 * i)]
    times = Stopwatch(CPU, clock).time_rounds(tasks, 3)
    assert clock.order == ["a", "b"] * (WARM_UP + 3)
    assert times.tolist() == [[2, 3, 4], [4, 6, 8]]
    assert quartiles(times[0]) == (2.5, 3, 3.5)


def test_one_call_is_timed() -> None:
    clock = Time()
    assert Stopwatch(CPU, clock).seconds(clock.work("b", lambda i: 7.0)) == 7


def test_a_gpu_has_done_its_work_when_the_time_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(clock, "now", clock.now + 3.0))
    assert Stopwatch(torch.device("cuda"), clock).seconds(lambda: None) == 3
    monkeypatch.setattr(torch.mps, "synchronize", lambda: setattr(clock, "now", clock.now + 2.0))
    assert Stopwatch(torch.device("mps"), clock).seconds(lambda: None) == 2
    assert Stopwatch(CPU, clock).seconds(lambda: None) == 0


@pytest.mark.parametrize(
    ("threads", "device", "clock"),
    [(1, "cpu", time.process_time), (2, "cpu", wall_clock), (1, "cuda", wall_clock), (1, "mps", wall_clock)],
)
def test_a_bench_with_one_thread_leaves_out_other_programs(
    threads: int, device: str, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert Stopwatch.for_bench(torch.device(device)).clock is clock
