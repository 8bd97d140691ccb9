"""The other processes of a run, known by the store that all share: whether they live, why one failed, who is there.

`dist.join` makes one `Peers` on each rank: `watch` runs the heartbeat, `wait_for_all` waits without a limit of time,
and `report` and `diagnose` say why a rank failed. A collective waits for a late process, and cannot tell a late one
from one that hangs. So every process gives a sign of life there each second, from a thread that takes no part in the
work, and looks for the others': the first rank for all, the others for the first. A process that gives no sign for long
is gone: this one then says which, and ends, whatever its main thread waits for. What does not go step by step (samples,
shards) may thus wait for others as long as they live.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import NoReturn

from torch.distributed.distributed_c10d import Store

from dumo.runtime import signals

MAX_INTERVAL = 1.0  # seconds from sign to sign: ours
MIN_LOOKS = 10  # for a sign, before a process is taken to be gone: ours
POLL_INTERVAL = 0.05  # seconds between looks for who is there: ours
RESTART = "start the same command again, it goes on from what is kept"


class Lost(RuntimeError):  # noqa: N818, a state of the run
    """Another process of the run is gone, failed or hangs. The command line exits with 1."""


class Peers:
    """The processes of a run, numbered from 0 to world - 1, as one of them sees the others."""

    def __init__(self, store: Store, rank: int, world: int, limit: float) -> None:
        """`limit`: after this many seconds without a sign a process is gone."""
        self.store = store
        self.rank = rank
        self.world = world
        self.limit = limit
        self.every = min(MAX_INTERVAL, limit / MIN_LOOKS)
        self.looks = round(limit / self.every)  # counted, not timed: who was stopped itself blames nobody
        self.others = list(range(1, world)) if rank == 0 else [0]  # those that this process looks for
        self.silent = dict.fromkeys(self.others, 0)  # looks since the last sign
        self.beats = 0
        self.meetings = 0
        self.settled = False  # whether a first step is done
        self.speaking = threading.Lock()  # held by the thread that says what ends this process
        self._last_signs: dict[int, bytes] = {}

    def beat(self) -> None:
        """Give a sign, and look for the others'. Blocks while the store does not answer."""
        self.store.set(f"alive/{self.rank}", str(self.beats))
        started = [other for other in self.others if self.store.check([f"alive/{other}"])]
        values = self.store.multi_get([f"alive/{other}" for other in started])
        signs = dict(zip(started, values, strict=True))
        for other in self.others:
            is_new = signs.get(other) != self._last_signs.get(other)
            self.silent[other] = 0 if is_new else self.silent[other] + 1
        self._last_signs = signs
        self.beats += 1

    def missing(self, looks: int) -> int | None:
        """A process without a sign for this many looks; None: there is none."""
        return next((other for other, n in self.silent.items() if n >= looks), None)

    def wait_for_all(self) -> None:
        """Wait for all, however long they work. Every process must call it.

        Raises Stopped where that is asked, `Lost` where one has failed.
        """
        self.meetings += 1
        key = f"met/{self.meetings}"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.world:
            signals.check()
            if self.store.check(["failed"]):
                raise self.diagnose()
            time.sleep(POLL_INTERVAL)

    def report(self, error: BaseException) -> None:
        """Report to the others why this process fails."""
        try:
            self.store.set(f"failed/{self.rank}", f"{error}" or type(error).__name__)
            self.store.set("failed", "")
        except RuntimeError:  # the store is gone, too
            return

    def diagnose(self, error: BaseException | None = None) -> Lost:
        """What is known of the others where talking to them fails. Takes some seconds: who is gone gives no sign."""
        self.speaking.acquire()  # for good: one line is enough
        reason = f" ({brief(error)})" if error else ""
        try:
            for _ in range(6):
                for other in self.others:
                    if self.store.check([f"failed/{other}"]):
                        return Lost(f"rank {other}: {self.store.get(f'failed/{other}').decode()}")
                gone = self.missing(3)
                if gone is not None:
                    return Lost(f"rank {gone} is gone: {RESTART}{reason}")
                time.sleep(self.every)
        except RuntimeError:  # the store is gone: with the first rank, or with torchrun
            pass
        return Lost(f"another rank is gone, or has not answered in time: {RESTART}{reason}")

    @contextmanager
    def watch(self) -> Generator[None, None, None]:
        """Meanwhile give signs; where one of the others is gone, end this process with a line and exit code 1."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.every):
                try:
                    self.beat()
                except RuntimeError:  # the store is gone; so are those whom the collectives will not find
                    over.set()

        def look() -> None:
            beats_before = 0
            stuck = 0  # looks since the last beat, which the store keeps waiting
            while not over.wait(self.every):
                beats = self.beats
                stuck = 0 if beats != beats_before else stuck + 1
                beats_before = beats
                gone = self.missing(self.looks)
                if stuck >= self.looks:
                    gone = 0  # has the store, and does not answer
                if gone is not None and self.speaking.acquire(blocking=False):
                    self.end(gone)

        threads = [threading.Thread(target=work, daemon=True) for work in (beat, look)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(2 * self.every)

    def end(self, gone: int) -> NoReturn:
        """Say who is gone, and leave: the first rank says it, or the second of the first."""
        if self.rank < 2:
            line = f"error: rank {gone} has not answered for {self.limit:g} seconds (DUMO_TIMEOUT): {RESTART}"
            print(line, file=sys.__stderr__, flush=True)
        else:
            time.sleep(5 * self.every)  # who is gone first ends the others
        os._exit(1)


def brief(error: BaseException) -> str:
    """The first sentence of torch's message, without the place in its code."""
    message = " ".join(str(error).split())
    message = re.sub(r"\[/\S+\] ?", "", message)
    return message.split(". ")[0][:200]
