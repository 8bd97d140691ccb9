"""How many threads share an operation of torch on a CPU, where the user leaves that to dumo.

torch takes one thread a core, and they spin while they wait for one another. So where another process has a core, each
small operation waits for the scheduler: a step takes ten times as long, and a sheet of samples a hundred times.

`StepThreads` is for training. The order of events:

1. `run.train` makes one, and enters it around the loop.
2. `choose` times trial steps with one thread and with all by turns: one thread, unless all are clearly faster.
3. The loop calls `begin` and `end` around each step. The number stays for the whole run, because it changes how sums
   round; only if steps become several times slower, steps of the training are compared again.

`fewer_when_busy` is for sampling and the like, whose parts differ in cost. Inside it, the work calls `check` between
two parts, which times tiny operations to see whether threads wait for a core, at most every RECHECK_SECONDS.

Nothing is changed on a GPU, among several ranks, and where somebody has set the number of threads: by OMP_NUM_THREADS,
MKL_NUM_THREADS or torch.set_num_threads.
"""

import ctypes
import os
import platform
import subprocess
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from dumo.runtime import dist
from dumo.runtime.stopwatch import Clock, Stopwatch, wall_clock

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_SYSCTL = "/usr/sbin/sysctl"  # of macOS
_HOW_TO_SET = f"{VARIABLES[0]}=N sets another"

# Of StepThreads; all are ours.
MAX_PAIRS = 10  # pairs of steps that are compared: one with one thread, one with all of them
_TRIAL_SECONDS = 5.0  # of trial steps, after which the pairs so far decide
MIN_SPEEDUP = 1.15  # times as fast, or several threads are not worth their waiting
_SURE_SPEEDUP = 3.0  # times as fast in the median so far: no more steps need be compared
_MIN_PAIRS = 3  # pairs of which the median is no hiccup of one step
WINDOW_SECONDS = 2.0  # of steps whose mean is compared with what a step took before
WINDOWS = 5  # of them: what lasts a few seconds is no reason to change the bits of a run
MAX_SLOWDOWN = 3.0  # times as long as before, in the median of the last windows: the number is measured again
MAX_RESUME_SLOWDOWN = 2.0  # times as long as with one thread: a resumed run goes on with one

# Of fewer_when_busy; ours, but for GRAIN.
GRAIN = 32_768  # elements: torch gives a thread no fewer
_ONE_THREAD_SECONDS = 0.005  # how long small operations are timed with one thread
_MANY_THREADS_SECONDS = 0.06  # how long with several: more than a turn of the scheduler
_WAIT_FACTOR = 10.0  # times as long as with one thread: a thread waited. On a busy machine it was several hundred
_BUSY_SHARE = 1 / 3  # of the time goes to operations that waited: the machine is busy
RECHECK_SECONDS = 10.0  # until the machine is measured again

_torch_threads: int | None = None  # the number that torch took by itself, noted before dumo sets another


def may_choose(device: torch.device) -> bool:
    """Whether dumo may choose the number of threads of work on a device: nobody else has, and there is a choice."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or dist.world() > 1 or threads == 1:
        return False
    if any(os.environ.get(name) for name in VARIABLES):
        return False
    return threads == _threads_by_default()


def _threads_by_default() -> int | None:
    """The number of threads that torch took by itself; None where it had been set in Python when dumo first asked."""
    global _torch_threads
    if _torch_threads is None and not was_set_in_python():
        _torch_threads = torch.get_num_threads()
    return _torch_threads


def was_set_in_python() -> bool:
    """Whether torch.set_num_threads was called in this process.

    torch does not say. But it then tells MKL to keep to the number; without MKL, a number other than torch's own choice
    was set.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return not library.mkl_serv_get_dynamic()
    except (OSError, AttributeError):
        return torch.get_num_threads() != _cores_that_torch_uses()


def _cores_that_torch_uses() -> int:
    """The number of cores that torch makes a thread for: all, but on Apple silicon the fast ones alone."""
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        command = [_SYSCTL, "-n", "hw.perflevel0.physicalcpu"]
        fast_cores = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if fast_cores.isdecimal() and int(fast_cores) > 1:
            return int(fast_cores)
    return cores()


def cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class StepThreads:
    """Chooses the number of threads of training steps: enter it around the loop, and call `choose` before the first.

    While `number` is None, steps are compared: on trial at first, later those of the training. `tell` is called with
    the lines of the log.
    """

    def __init__(
        self,
        device: torch.device,
        tell: Callable[[str], None],
        *,
        fixed: bool = False,
        recorded: int | None = None,
        step: int = 0,
        clock: Clock = wall_clock,
    ) -> None:
        """Change nothing yet, and nothing later where the number is `fixed`.

        `recorded` is the number that the steps up to `step` were made with, on as many cores as here. It is kept,
        unless trial steps with it take MAX_RESUME_SLOWDOWN times as long as with one thread: the machine is busy then.
        """
        self.tell = tell
        self.step = step
        self.clock = clock
        self.may_change = not fixed and may_choose(device)
        self.all_threads = torch.get_num_threads()
        self.recorded = recorded
        # the choice
        on_cpu = device.type == "cpu"
        self.number: int | None = self.all_threads if on_cpu else None  # None: not chosen yet, or not on a CPU
        self.current = self.all_threads  # threads of the step that is made now
        # the comparison
        self.is_warm = False  # the first step is over
        self.seconds: dict[int, list[float]] = {1: [], self.all_threads: []}  # of compared steps, by number of threads
        self.step_began = 0.0
        # the watch over later steps
        self.usual_step_seconds: float | None = None  # the mean in the first windows
        self.window: list[float] = []  # seconds of each step in the window that is not full yet
        self.windows: deque[float] = deque(maxlen=WINDOWS)  # mean seconds of a step in the last windows
        self.became_slow = False  # the number is chosen again

    def __enter__(self) -> "StepThreads":
        if not self.may_change:
            if self.number is not None and self.recorded not in (None, self.number):
                before = f"{self.recorded} up to step {self.step:,}"
                self.tell(f"{_threads_text(self.number)}, and {before}: numbers may round otherwise")
            return self
        self.number = None
        if self.recorded == 1:
            self.number = 1
            self._use(1)
            self.tell(f"1 thread, as up to step {self.step:,}; {_HOW_TO_SET}")
        return self

    def __exit__(self, *error: object) -> None:
        if self.may_change:
            self._use(self.all_threads)

    def choose(self, try_step: Callable[[], object]) -> None:
        """Choose by trial steps, where there is a choice. `try_step` must leave the training as it is."""
        if not self.may_change or self.number is not None:
            return
        trial_began = self.clock()
        while self.number is None:
            self.begin()
            try_step()
            self.end()
            has_pair = bool(self.seconds[self.all_threads])
            if self.number is None and has_pair and self.clock() - trial_began > _TRIAL_SECONDS:
                self._decide()
        self.usual_step_seconds = None  # a step of the training waits for its data, too

    def begin(self) -> None:
        """Note that a step begins, with the data that it waits for."""
        self.step_began = self.clock()

    def end(self) -> None:
        """Note that the step is done. The next one may have another number of threads."""
        if not self.may_change or self.number == 1:
            return
        seconds = self.clock() - self.step_began
        if self.number is None:
            self._compare(seconds)
        else:
            self._watch(seconds)

    def _compare(self, seconds: float) -> None:
        """Let the next step have the other number of threads, until it is clear which is faster."""
        if not self.is_warm:  # the first step has more to do
            self.is_warm = True
            self._use(1)
            return
        self.seconds[self.current].append(seconds)
        if self.current == 1:
            self._use(self.all_threads)
            return
        speedup = median(self.seconds[1]) / median(self.seconds[self.all_threads])
        pairs = len(self.seconds[1])
        is_sure_of_all = speedup >= _SURE_SPEEDUP  # after one pair: a step with one thread may take minutes
        is_sure_of_one = speedup <= 1 / _SURE_SPEEDUP and pairs >= _MIN_PAIRS
        if is_sure_of_all or is_sure_of_one or pairs >= MAX_PAIRS:
            self._decide()
        else:
            self._use(1)

    def _decide(self) -> None:
        """Choose by the compared steps, and say so."""
        all_threads_seconds = median(self.seconds[self.all_threads])
        speedup = median(self.seconds[1]) / all_threads_seconds
        min_speedup = MIN_SPEEDUP
        if self.became_slow:  # one thread must win: steps that wait for their data are as slow with either number
            min_speedup = 1 / MIN_SPEEDUP
        elif self.recorded == self.all_threads:
            min_speedup = 1 / MAX_RESUME_SLOWDOWN
        self.number = self.all_threads if speedup >= min_speedup else 1
        self._use(self.number)
        if not self.became_slow:
            self.tell(f"{self._reason(speedup)}; {_HOW_TO_SET}")
        elif self.number == 1:
            assert self.usual_step_seconds is not None  # `_watch` found the steps slower
            slowdown = all_threads_seconds / self.usual_step_seconds
            self.tell(
                f"steps take {slowdown:.0f} times as long as before: the machine is busy, so training goes on with "
                "1 thread"
            )
        self.usual_step_seconds = all_threads_seconds

    def _reason(self, speedup: float) -> str:
        """A line for the log: the number, and why it was chosen before the first step."""
        if self.number == self.recorded:
            return f"{_threads_text(self.all_threads)}, as up to step {self.step:,}"
        if self.number != 1:
            return f"{_threads_text(self.all_threads)}: steps are {speedup:.2g} times as fast as with 1"
        if speedup < 1:
            return f"1 thread: with {self.all_threads} steps take {1 / speedup:.2g} times as long here"
        return f"1 thread: with {self.all_threads} steps are {speedup:.2f} times as fast, too little"

    def _watch(self, seconds: float) -> None:
        """Begin a comparison where steps have become several times slower."""
        self.window.append(seconds)
        if sum(self.window) < WINDOW_SECONDS:
            return
        self.windows.append(sum(self.window) / len(self.window))
        self.window = []
        if len(self.windows) < WINDOWS:
            return
        step_seconds = median(self.windows)
        if self.usual_step_seconds is None:
            self.usual_step_seconds = step_seconds
        if step_seconds > MAX_SLOWDOWN * self.usual_step_seconds:
            self.became_slow = True
            self.number = None
            self.seconds = {1: [], self.all_threads: []}
            self.windows.clear()
            self._use(1)

    def _use(self, threads: int) -> None:
        """Let torch take this number of threads from now on."""
        self.current = threads
        torch.set_num_threads(threads)


class _BusyMachine:
    """Sets the number of threads of the work inside `fewer_when_busy`."""

    def __init__(self, all_threads: int, tell: Callable[[str], None], clock: Clock) -> None:
        self.all_threads = all_threads
        self.tell = tell
        self.clock = clock
        self.has_logged = False

    def set_threads(self) -> None:
        """Measure how many threads need not wait, unless that was measured a moment ago, and set that number."""
        global _answer
        now = self.clock()
        if _answer is None or now - _answer.at >= RECHECK_SECONDS or _answer.threads > self.all_threads:
            _answer = _BusyAnswer(now, max_threads_without_waiting(self.all_threads))
        threads = _answer.threads
        torch.set_num_threads(threads)
        if threads < self.all_threads and not self.has_logged:
            self.has_logged = True
            self.tell(
                f"{_threads_text(threads)}, for {self.all_threads} would wait: the machine is busy; {_HOW_TO_SET}"
            )


class _BusyAnswer(NamedTuple):
    """How many threads need not wait, and when that was measured."""

    at: float  # seconds, of the clock
    threads: int


# The state of the process.
_answer: _BusyAnswer | None = None  # None: not measured yet
# of the `fewer_when_busy` that this thread is in; None: it is in none
_machine: ContextVar[_BusyMachine | None] = ContextVar("machine", default=None)


@contextmanager
def fewer_when_busy(
    device: torch.device, tell: Callable[[str], None], *, clock: Clock = wall_clock
) -> Generator[None, None, None]:
    """Do what is inside with fewer threads while other processes have cores of this machine.

    The work calls `check` between its parts. `tell` is called once, when there are fewer. Afterwards the number is what
    it was.
    """
    if not may_choose(device):
        yield
        return
    all_threads = torch.get_num_threads()
    machine = _BusyMachine(all_threads, tell, clock)
    token = _machine.set(machine)
    try:
        machine.set_threads()
        yield
    finally:
        _machine.reset(token)
        torch.set_num_threads(all_threads)


def check() -> None:
    """Set the number of threads again, between two parts of work inside `fewer_when_busy`; elsewhere do nothing."""
    machine = _machine.get()
    if machine:
        machine.set_threads()


def max_threads_without_waiting(limit: int) -> int:
    """The largest of `limit`, limit / 2, limit / 4 ... threads that need not wait for a core; 1 if all wait."""
    x = torch.zeros(limit * GRAIN)
    usual_seconds = median(operation_times(x, 1, _ONE_THREAD_SECONDS))
    threads = limit
    while threads > 1:
        times = operation_times(x, threads, _MANY_THREADS_SECONDS)
        waited_seconds = sum(seconds for seconds in times if seconds > _WAIT_FACTOR * usual_seconds)
        if waited_seconds < _BUSY_SHARE * sum(times):
            return threads
        threads //= 2
    return 1


def operation_times(x: Tensor, threads: int, duration: float) -> list[float]:
    """Time small operations on `x` for `duration` seconds: the seconds of each. The number of threads stays set."""
    torch.set_num_threads(threads)
    x.add_(1)  # the threads are there now
    return Stopwatch(x.device).repeat(partial(x.add_, 1), duration)


def _threads_text(threads: int) -> str:
    """A number of threads in words: "1 thread", "2 threads"."""
    return "1 thread" if threads == 1 else f"{threads} threads"
