"""How many threads share an operation of torch on a CPU, where the user leaves that to dumo.

torch takes one thread a core, and they spin while they wait for one another. So where another process has a core, each
small operation waits for the scheduler: a step takes ten times as long, and a sheet of samples a hundred times.

`StepThreads` times trial steps before training: one thread, unless all are clearly faster. The number stays for the
whole run, because it changes how sums round; it is measured again only if steps become several times slower.
`fewer_when_busy` is for sampling and the like, whose parts differ in cost: it times tiny operations to see whether
threads wait for a core, at most every RECHECK_SECONDS.

Nothing is changed on a GPU, among several ranks, and where somebody has said how many threads there are: by
OMP_NUM_THREADS, MKL_NUM_THREADS or torch.set_num_threads.
"""

import ctypes
import os
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
HOW_TO_SET = f"{VARIABLES[0]}=N sets another"

# All of these are ours.
MAX_PAIRS = 10  # steps with one thread, and as many with all of them, by turns
TRIAL_SECONDS = 5.0  # of trial steps, after which the pairs so far decide
MIN_SPEEDUP = 1.15  # times as fast, or several threads are not worth their waiting
SURE_SPEEDUP = 3.0  # times as fast in the median so far: no more steps need be compared
MIN_PAIRS = 3  # pairs of which the median is no hiccup of one step
WINDOW_SECONDS = 2.0  # of steps whose mean is compared with what a step took before
WINDOWS = 5  # of them: what lasts a few seconds is no reason to change the bits of a run
MAX_SLOWDOWN = 3.0  # times as long as before, in the median of the last windows: the number is measured again
MAX_RESUME_SLOWDOWN = 2.0  # times as long as with one thread: a resumed run goes on with one

GRAIN = 32_768  # elements: torch gives a thread no fewer
ONE_THREAD_SECONDS = 0.005  # of small operations with one thread
MANY_THREADS_SECONDS = 0.06  # of them with several: more than a turn of the scheduler
WAIT_FACTOR = 10.0  # times as long as with one thread: a thread waited. On a busy machine it was several hundred
BUSY_SHARE = 1 / 3  # of the time goes to operations that waited: the machine is busy
RECHECK_SECONDS = 10.0  # until the machine is asked again

_torch_threads: int | None = None  # what torch took by itself, once this is known: dumo sets other numbers later


def may_choose(device: torch.device) -> bool:
    """Whether dumo chooses the number of threads of work on a device: nobody has, and there is a choice."""
    global _torch_threads
    threads = torch.get_num_threads()
    if device.type != "cpu" or dist.world() > 1 or threads == 1:
        return False
    if any(os.environ.get(name) for name in VARIABLES):
        return False
    if _torch_threads is None and not set_in_python():
        _torch_threads = threads
    return threads == _torch_threads


def set_in_python() -> bool:
    """Whether torch.set_num_threads was called in this process.

    torch does not say. But it then tells MKL to keep to the number; without MKL, a number other than that of cores was
    set.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return not library.mkl_serv_get_dynamic()
    except (OSError, AttributeError):
        return torch.get_num_threads() != cores()


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class StepThreads:
    """Chooses the number of threads of a training's steps: `with` it around the loop, and `choose` before the first.

    Steps are compared with one thread and with all by turns: on trial at first, later those of the training.
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
        self.usual_step_seconds: float | None = None  # as the first windows have it
        self.clock = clock
        self.on_cpu = device.type == "cpu"
        self.may_change = not fixed and may_choose(device)
        self.all_threads = torch.get_num_threads()
        self.recorded = recorded
        self.number: int | None = self.all_threads if self.on_cpu else None  # None: not known yet, or not of a CPU
        self.current = self.all_threads  # in the step that is made now
        self.warm = False
        self.seconds: dict[int, list[float]] = {1: [], self.all_threads: []}  # of the steps that are compared
        self.window: list[float] = []  # seconds of the steps of the window that is not full yet
        self.windows: deque[float] = deque(maxlen=WINDOWS)  # seconds of a step in the last windows
        self.became_slow = False  # the number is measured again
        self.began = 0.0

    def __enter__(self) -> "StepThreads":
        if not self.may_change:
            if self.number is not None and self.recorded not in (None, self.number):
                before = f"{self.recorded} up to step {self.step:,}"
                self.tell(f"{threads_text(self.number)}, and {before}: numbers may round otherwise")
            return self
        self.number = None
        if self.recorded == 1:
            self.number = 1
            self._use(1)
            self.tell(f"1 thread, as up to step {self.step:,}; {HOW_TO_SET}")
        return self

    def __exit__(self, *error: object) -> None:
        if self.may_change:
            self._use(self.all_threads)

    def choose(self, try_step: Callable[[], object]) -> None:
        """Choose by trial steps, where there is a choice. They must leave the training as it is."""
        if not self.may_change or self.number is not None:
            return
        began = self.clock()
        while self.number is None:
            self.begin()
            try_step()
            self.end()
            has_pair = bool(self.seconds[self.all_threads])
            if self.number is None and has_pair and self.clock() - began > TRIAL_SECONDS:
                self._decide()
        self.usual_step_seconds = None  # a step of the training waits for its data, too

    def begin(self) -> None:
        """A step begins, with the data that it waits for."""
        self.began = self.clock()

    def end(self) -> None:
        """The step is done. The next one may have another number of threads."""
        if not self.may_change or self.number == 1:
            return
        seconds = self.clock() - self.began
        if self.number is None:
            self._compare(seconds)
        else:
            self._watch(seconds)

    def _compare(self, seconds: float) -> None:
        """Take the next step with the other number, until it is clear which is better."""
        if not self.warm:  # the first step has more to do
            self.warm = True
            self._use(1)
            return
        self.seconds[self.current].append(seconds)
        if self.current == 1:
            self._use(self.all_threads)
            return
        speedup = median(self.seconds[1]) / median(self.seconds[self.all_threads])
        pairs = len(self.seconds[1])
        all_surely = speedup >= SURE_SPEEDUP  # after one pair: a step with one thread may take minutes
        one_surely = speedup <= 1 / SURE_SPEEDUP and pairs >= MIN_PAIRS
        if pairs < MAX_PAIRS and not all_surely and not one_surely:
            self._use(1)
            return
        self._decide()

    def _decide(self) -> None:
        """Take the number that the steps so far speak for, and say so."""
        all_threads_seconds = median(self.seconds[self.all_threads])
        speedup = median(self.seconds[1]) / all_threads_seconds
        least = MIN_SPEEDUP
        if self.became_slow:  # one thread must win: steps that wait for their data are as slow with either number
            least = 1 / MIN_SPEEDUP
        elif self.recorded == self.all_threads:
            least = 1 / MAX_RESUME_SLOWDOWN
        self.number = self.all_threads if speedup >= least else 1
        self._use(self.number)
        if not self.became_slow:
            self.tell(f"{self._reason(speedup)}; {HOW_TO_SET}")
        elif self.number == 1:
            assert self.usual_step_seconds is not None  # `_watch` found the steps slower
            slowdown = all_threads_seconds / self.usual_step_seconds
            self.tell(
                f"steps take {slowdown:.0f} times as long as before: the machine is busy, so training goes on with "
                "1 thread"
            )
        self.usual_step_seconds = all_threads_seconds

    def _reason(self, speedup: float) -> str:
        """Why this number was chosen, before the first step."""
        if self.number == self.recorded:
            return f"{threads_text(self.all_threads)}, as up to step {self.step:,}"
        if self.number != 1:
            return f"{threads_text(self.all_threads)}: steps are {speedup:.2g} times as fast as with 1"
        if speedup < 1:
            return f"1 thread: with {self.all_threads} steps take {1 / speedup:.2g} times as long here"
        return f"1 thread: with {self.all_threads} steps are {speedup:.2f} times as fast, too little"

    def _watch(self, seconds: float) -> None:
        """Compare again where steps have become several times slower."""
        self.window.append(seconds)
        if sum(self.window) < WINDOW_SECONDS:
            return
        self.windows.append(sum(self.window) / len(self.window))
        self.window = []
        if len(self.windows) < WINDOWS:
            return
        now = median(self.windows)
        if self.usual_step_seconds is None:
            self.usual_step_seconds = now
        if now > MAX_SLOWDOWN * self.usual_step_seconds:
            self.became_slow = True
            self.number = None
            self.seconds = {1: [], self.all_threads: []}
            self.windows.clear()
            self._use(1)

    def _use(self, threads: int) -> None:
        self.current = threads
        torch.set_num_threads(threads)


class BusyMachine:
    """The number of threads of the work inside `fewer_when_busy`."""

    def __init__(self, all_threads: int, tell: Callable[[str], None], clock: Clock) -> None:
        self.all_threads = all_threads
        self.tell = tell
        self.clock = clock
        self.has_spoken = False

    def set_threads(self) -> None:
        """Ask the machine, unless it was asked a moment ago, and go on with as many threads as need not wait."""
        global _answer
        now = self.clock()
        if _answer is None or now - _answer.at >= RECHECK_SECONDS or _answer.threads > self.all_threads:
            _answer = BusyAnswer(now, max_threads_without_waiting(self.all_threads))
        threads = _answer.threads
        torch.set_num_threads(threads)
        if threads < self.all_threads and not self.has_spoken:
            self.has_spoken = True
            self.tell(f"{threads_text(threads)}, for {self.all_threads} would wait: the machine is busy; {HOW_TO_SET}")


class BusyAnswer(NamedTuple):
    """What the machine said: when, and how many threads need not wait."""

    at: float
    threads: int


_answer: BusyAnswer | None = None
_machine: ContextVar[BusyMachine | None] = ContextVar("machine", default=None)


@contextmanager
def fewer_when_busy(
    device: torch.device, tell: Callable[[str], None], *, clock: Clock = wall_clock
) -> Generator[None, None, None]:
    """Do what is inside with fewer threads while other processes have cores of this machine; `tell` hears of it once.

    The work itself calls `check` between its parts. Afterwards the number is what it was.
    """
    if not may_choose(device):
        yield
        return
    all_threads = torch.get_num_threads()
    machine = BusyMachine(all_threads, tell, clock)
    token = _machine.set(machine)
    try:
        machine.set_threads()
        yield
    finally:
        _machine.reset(token)
        torch.set_num_threads(all_threads)


def check() -> None:
    """Between two parts of work: see whether the machine is busy, where that is asked for and was not just seen."""
    machine = _machine.get()
    if machine:
        machine.set_threads()


def max_threads_without_waiting(most: int) -> int:
    """The largest of `most`, a half, a quarter ... of as many threads that need not wait for a core."""
    x = torch.zeros(most * GRAIN)
    usual = median(operation_times(x, 1, ONE_THREAD_SECONDS))
    threads = most
    while threads > 1:
        times = operation_times(x, threads, MANY_THREADS_SECONDS)
        waited = sum(seconds for seconds in times if seconds > WAIT_FACTOR * usual)
        if waited < BUSY_SHARE * sum(times):
            return threads
        threads //= 2
    return 1


def operation_times(x: Tensor, threads: int, duration: float) -> list[float]:
    """What small operations take with this number of threads, which stays, in seconds, for this long."""
    torch.set_num_threads(threads)
    x.add_(1)  # the threads are there now
    return Stopwatch(x.device).repeat(partial(x.add_, 1), duration)


def threads_text(threads: int) -> str:
    """A number of threads in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"
