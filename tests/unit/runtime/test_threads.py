"""How many threads work takes: by what its parts took, on a clock of the test's own."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from dumo.runtime import threads
from dumo.runtime.threads import StepThreads

CPU = torch.device("cpu")
FOUND = """
import torch
from dumo.runtime import threads
cpu, number = torch.device("cpu"), torch.get_num_threads()
print(number == 1 or threads.may_choose(cpu), threads.may_choose(torch.device("cuda")))
torch.set_num_threads(1)
torch.set_num_threads(number)
print(number > 1 and threads.may_choose(cpu))
torch.set_num_threads(number + 1)
print(threads.may_choose(cpu))
threads._torch_threads = None
torch.set_num_threads(number)
print(threads.was_set_in_python(), threads.may_choose(cpu))
"""


@dataclass
class Machine:
    """A machine of two cores: what a step takes with so many threads, and torch's number of them."""

    seconds: Callable[[int], float]
    threads: int = 2
    now: float = 0.0
    asked: list[int] = field(default_factory=list[int])  # the number of threads, whenever it was set
    said: list[str] = field(default_factory=list[str])

    def use(self, number: int) -> None:
        self.threads = number
        self.asked.append(number)

    def clock(self) -> float:
        return self.now

    def make(self, chooser: StepThreads, steps: int) -> list[int]:
        """Make steps; the number of threads of each."""
        taken: list[int] = []
        for _ in range(steps):
            chooser.begin()
            taken.append(self.threads)
            self.now += self.seconds(self.threads)
            chooser.end()
            self.now += 60  # a checkpoint is written, which is no part of a step
        return taken

    def chooser(self, *, recorded: int | None = None, step: int = 0) -> StepThreads:
        return StepThreads(CPU, self.said.append, recorded=recorded, step=step, clock=self.clock)

    def try_step(self) -> None:
        self.now += self.seconds(self.threads)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two threads are twice as fast as one, and the user has said nothing."""
    made = Machine({1: 2.0, 2: 1.0}.__getitem__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: made.threads)
    monkeypatch.setattr(torch, "set_num_threads", made.use)
    monkeypatch.setattr(threads, "may_choose", lambda device: True)
    return made


@pytest.mark.parametrize(
    ("one", "two", "number", "line"),
    [
        (
            1.0,
            1.0,
            1,
            "1 thread: with 2 steps are 1.00 times as fast, too little; OMP_NUM_THREADS=N sets another",
        ),
        (
            1.1,
            1.0,
            1,
            "1 thread: with 2 steps are 1.10 times as fast, too little; OMP_NUM_THREADS=N sets another",
        ),
        (1.0, 2.0, 1, "1 thread: with 2 steps take 2 times as long here; OMP_NUM_THREADS=N sets another"),
        (1.6, 1.0, 2, "2 threads: steps are 1.6 times as fast as with 1; OMP_NUM_THREADS=N sets another"),
    ],
)
def test_one_thread_unless_two_are_clearly_faster(
    machine: Machine, one: float, two: float, number: int, line: str
) -> None:
    machine.seconds = {1: one, 2: two}.__getitem__
    with machine.chooser() as chooser:
        first = machine.make(chooser, 1 + 2 * threads.MAX_PAIRS)
        assert first == [2] + [1, 2] * threads.MAX_PAIRS
        assert chooser.number == number
        assert set(machine.make(chooser, 50)) == {number}
    assert machine.said == [line]  # once
    assert machine.threads == 2  # as it was found


@pytest.mark.parametrize(("two", "number", "steps"), [(0.1, 2, 3), (10.0, 1, 7)])
def test_what_is_sure_needs_few_steps(machine: Machine, two: float, number: int, steps: int) -> None:
    machine.seconds = {1: 1.0, 2: two}.__getitem__
    with machine.chooser() as chooser:
        machine.make(chooser, steps - 1)
        assert chooser.number is None  # nothing is recorded yet
        machine.make(chooser, 1)
        assert chooser.number == number


def test_steps_on_trial_choose_before_the_first_step(machine: Machine) -> None:
    def try_step() -> None:
        machine.now += 0.01 * machine.seconds(machine.threads)

    with machine.chooser() as chooser:
        chooser.choose(try_step)
        assert chooser.number == 2
        assert set(machine.make(chooser, 40)) == {2}
        machine.seconds = {1: 2.0, 2: 9.0}.__getitem__
        machine.make(chooser, 40)
        assert chooser.number == 1  # slower than its first steps were, not than those on trial
    assert len(machine.said) == 2


def test_long_steps_are_tried_as_one_pair(machine: Machine) -> None:
    tried: list[int] = []

    def try_step() -> None:
        tried.append(machine.threads)
        machine.now += 60 * machine.seconds(machine.threads)

    with machine.chooser() as chooser:
        chooser.choose(try_step)
        assert tried == [2, 1, 2]
        assert chooser.number == 2


def test_one_recorded_thread_needs_no_trial(machine: Machine) -> None:
    with machine.chooser(recorded=1, step=10) as chooser:
        chooser.choose(lambda: pytest.fail("tried"))


def test_a_hiccup_decides_nothing(machine: Machine) -> None:
    steps = iter([9.0, 1.6, 1.0, 1.6, 9.0, 9.0, 1.0] + [1.6, 1.0] * 20)
    machine.seconds = lambda number: next(steps)
    with machine.chooser() as chooser:
        machine.make(chooser, 1 + 2 * threads.MAX_PAIRS)
        assert chooser.number == 2


def test_threads_are_dropped_where_steps_become_slow(machine: Machine) -> None:
    with machine.chooser() as chooser:
        machine.make(chooser, 40)
        assert chooser.number == 2
        del machine.said[:]
        machine.seconds = {1: 2.0, 2: 9.0}.__getitem__
        machine.make(chooser, 40)
        assert chooser.number == 1
        assert set(machine.make(chooser, 10)) == {1}
    [line] = machine.said
    assert line == "steps take 9 times as long as before: the machine is busy, so training goes on with 1 thread"


@pytest.mark.parametrize("one", [18.0, 9.0])
def test_slower_steps_keep_their_threads_unless_one_wins(machine: Machine, one: float) -> None:
    """Slower still with one thread, as where a later part of a training costs more; as slow, as where data are late."""
    with machine.chooser() as chooser:
        machine.make(chooser, 40)
        machine.seconds = {1: one, 2: 9.0}.__getitem__
        machine.make(chooser, 100)
        assert chooser.number == 2
        assert set(machine.make(chooser, 100)) == {2}  # it is measured once
    assert len(machine.said) == 1


def test_a_moment_of_slow_steps_changes_nothing(machine: Machine) -> None:
    with machine.chooser() as chooser:
        machine.make(chooser, 40)
        machine.seconds = {1: 2.0, 2: 3.5}.__getitem__
        machine.make(chooser, 2)
        machine.seconds = {1: 2.0, 2: 1.0}.__getitem__
        assert set(machine.make(chooser, 40)) == {2}


@pytest.mark.parametrize("recorded", [1, 2])
def test_a_recorded_number_is_kept(machine: Machine, recorded: int) -> None:
    machine.seconds = {1: 1.0, 2: 1.5}.__getitem__  # one would be chosen now
    with machine.chooser(recorded=recorded, step=1000) as chooser:
        chooser.choose(machine.try_step)
        assert set(machine.make(chooser, 100)) == {recorded}
        assert chooser.number == recorded
    word = "1 thread" if recorded == 1 else "2 threads"
    assert machine.said == [f"{word}, as up to step 1,000; OMP_NUM_THREADS=N sets another"]


def test_a_recorded_number_is_not_kept_on_a_busy_machine(machine: Machine) -> None:
    machine.seconds = {1: 2.0, 2: 9.0}.__getitem__
    with machine.chooser(recorded=2, step=1000) as chooser:
        chooser.choose(machine.try_step)
        assert chooser.number == 1
    assert machine.said == ["1 thread: with 2 steps take 4.5 times as long here; OMP_NUM_THREADS=N sets another"]


def test_a_number_of_another_machine_is_chosen_anew(machine: Machine) -> None:
    with machine.chooser(recorded=8) as chooser:
        machine.make(chooser, 40)
        assert chooser.number == 2


def test_a_users_number_is_left_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "may_choose", lambda device: False)
    machine.seconds = {1: 1.0, 2: 99.0}.__getitem__
    with machine.chooser(recorded=1, step=10) as chooser:
        machine.make(chooser, 40)
        assert chooser.number == 2  # it is recorded
    assert machine.asked == []
    assert machine.said == ["2 threads, and 1 up to step 10: numbers may round otherwise"]


def test_compiled_steps_keep_the_number_they_were_compiled_for(machine: Machine) -> None:
    with StepThreads(CPU, machine.said.append, fixed=True, clock=machine.clock) as chooser:
        machine.make(chooser, 40)
    assert machine.asked == machine.said == []


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_a_variable_is_a_users_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "was_set_in_python", lambda: False)
    monkeypatch.setattr(threads, "_torch_threads", None)
    for variable in threads.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert threads.may_choose(CPU)
    assert not threads.may_choose(torch.device("cuda"))
    monkeypatch.setenv(name, "4")
    assert not threads.may_choose(CPU)


@pytest.mark.nightly
def test_a_number_set_in_python_is_a_users_own() -> None:
    """Also where it is the one that torch takes by itself, unless dumo has set others before."""
    environment = {name: value for name, value in os.environ.items() if name not in threads.VARIABLES}
    told = subprocess.run(
        [sys.executable, "-c", FOUND], stdout=subprocess.PIPE, check=True, text=True, env=environment
    ).stdout.split()
    if threads.cores() == 1:
        pytest.skip("there is nothing to choose")
    assert told == ["True", "False", "True", "False", "True", "False"]


def test_on_apple_silicon_torch_takes_the_fast_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysctl = tmp_path / "sysctl"
    sysctl.write_text('#!/bin/sh\ntest "$*" = "-n hw.perflevel0.physicalcpu" && echo 17\n')
    sysctl.chmod(0o755)
    monkeypatch.setattr(threads, "_SYSCTL", str(sysctl))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))  # no MKL lies next to it
    for number in (17, threads.cores()):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert threads.was_set_in_python() == (number != 17)


def test_busy_machines_get_fewer_threads(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([2, 1, 1, 2])
    monkeypatch.setattr(threads, "_answer", None)
    monkeypatch.setattr(threads, "max_threads_without_waiting", lambda most: next(answers))
    taken: list[int] = []
    with threads.fewer_when_busy(CPU, machine.said.append, clock=machine.clock):
        for _ in range(8):
            threads.check()
            taken.append(machine.threads)
            machine.now += threads.RECHECK_SECONDS / 2
    assert taken == [2, 2, 1, 1, 1, 1, 2, 2]  # asked at times, not for every part
    assert machine.said == ["1 thread, for 2 would wait: the machine is busy; OMP_NUM_THREADS=N sets another"]
    assert machine.threads == 2
    threads.check()  # outside of it there is nobody who asks
    assert machine.threads == 2


def test_a_busy_machine_does_not_change_a_users_number(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "may_choose", lambda device: False)
    with threads.fewer_when_busy(CPU, machine.said.append):
        threads.check()
    assert machine.asked == machine.said == []


@pytest.mark.parametrize(("slow", "number"), [((), 8), ((8,), 4), ((8, 4), 2), ((8, 4, 2), 1)])
def test_halves_of_the_threads_are_tried(monkeypatch: pytest.MonkeyPatch, slow: tuple[int, ...], number: int) -> None:
    def times(x: torch.Tensor, threads: int, duration: float) -> list[float]:
        return [1e-5] * 1000 + [0.02] * 3 if threads in slow else [1e-5] * 1000 + [0.002]

    monkeypatch.setattr(threads, "operation_times", times)
    assert threads.max_threads_without_waiting(8) == number


def test_operations_take_time() -> None:
    times = threads.operation_times(torch.zeros(threads.GRAIN), 1, 0.001)
    assert times
    assert min(times) > 0
