"""The heartbeat of a run of several processes: which ranks live, why one failed, and whether all have arrived.

A collective waits for a late rank, and cannot tell a late one from one that hangs. So the ranks talk past it, through
the store that all share. `dist.join` makes one `Peers` on each rank:

1. `watch` starts two threads. One calls `beat` about each second: it writes a sign of life into the store, and reads
   those of other ranks: rank 0 of all others, each other rank that of rank 0. The second thread ends this process, with
   a line, once such a rank has given no sign for DUMO_TIMEOUT seconds, whatever the main thread waits for.
2. `wait_for_all` waits for all ranks as long as they live. What does not go step by step (samples, shards) waits so.
3. Where a rank fails, it calls `report`. The others find their collectives broken, and `diagnose` makes a `Lost` of it
   that names the rank to blame.

The keys in the store: `alive/RANK` (the number of the latest sign), `failed/RANK` (why a rank failed), `failed` (set
once any has), `met/N` (how many ranks have come to the N-th `wait_for_all`).
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

# All ours
_MAX_INTERVAL = 1.0  # seconds from one sign of life to the next
_MIN_LOOKS = 10  # looks without a new sign, before a rank is taken to be gone
POLL_INTERVAL = 0.05  # seconds between two looks in `wait_for_all`
_DIAGNOSIS_LOOKS = 6  # looks, an interval apart, for the rank that broke a collective
_DIAGNOSIS_MISSED_SIGNS = 3  # signs that a rank has missed to be blamed for a broken collective
_EXIT_DELAY_INTERVALS = 5  # that ranks from 2 on wait before they exit, so that rank 0 or 1 says why
_MAX_REASON_CHARACTERS = 200

RESTART = "start the same command again, it goes on from what is kept"  # the fix that messages end with


class Lost(RuntimeError):  # noqa: N818, a state of the run
    """Another process of the run is gone, failed or hangs. The command line exits with 1."""


class Peers:
    """The ranks of a run, as one of them sees the others."""

    def __init__(self, store: Store, rank: int, world: int, limit: float) -> None:
        """`limit`: seconds without a sign of life after which a rank is taken to be gone."""
        self.store = store
        self.rank = rank
        self.world = world
        self.limit = limit
        self.is_first_step_done = False  # set by `dist.shorten_timeouts`
        self.interval = min(_MAX_INTERVAL, limit / _MIN_LOOKS)  # seconds from sign to sign
        # counted, not timed: a process that was stopped itself blames nobody
        self.max_missed_signs = round(limit / self.interval)
        self.watched_ranks = list(range(1, world)) if rank == 0 else [0]
        self.missed_signs = dict.fromkeys(self.watched_ranks, 0)  # by rank: looks since its last new sign
        self._signs: dict[int, bytes] = {}  # by rank: the sign at the last look
        self._num_signs_given = 0
        self._num_waits = 0  # calls of `wait_for_all`
        self._exit_lock = threading.Lock()  # held by the thread that says why this process ends

    def beat(self) -> None:
        """Give a sign of life, and look for those of the watched ranks. Blocks while the store does not answer."""
        self.store.set(f"alive/{self.rank}", str(self._num_signs_given))
        started = [rank for rank in self.watched_ranks if self.store.check([f"alive/{rank}"])]
        values = self.store.multi_get([f"alive/{rank}" for rank in started])
        signs = dict(zip(started, values, strict=True))
        for rank in self.watched_ranks:
            if signs.get(rank) != self._signs.get(rank):
                self.missed_signs[rank] = 0
            else:
                self.missed_signs[rank] += 1
        self._signs = signs
        self._num_signs_given += 1

    def find_missing(self, min_missed_signs: int) -> int | None:
        """The first watched rank that has missed at least this many signs; None: there is none."""
        for rank, num_missed in self.missed_signs.items():
            if num_missed >= min_missed_signs:
                return rank
        return None

    def wait_for_all(self) -> None:
        """Wait until every rank is here, however long they work. Every rank must call it.

        Raises Stopped after a signal, and `Lost` where a rank has failed.
        """
        self._num_waits += 1
        key = f"met/{self._num_waits}"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.world:
            signals.check()
            if self.store.check(["failed"]):
                raise self.diagnose()
            time.sleep(POLL_INTERVAL)

    def report(self, error: BaseException) -> None:
        """Tell the other ranks why this one fails."""
        try:
            self.store.set(f"failed/{self.rank}", f"{error}" or type(error).__name__)
            self.store.set("failed", "")
        except RuntimeError:  # the store is gone, too
            return

    def diagnose(self, error: BaseException | None = None) -> Lost:
        """Find out which rank broke a collective. Returns the error to raise; it ends with `error`, torch's own.

        Takes some seconds, because a rank that is gone is known by the signs that it misses.
        """
        self._exit_lock.acquire()  # never released, so that `watch` adds no second line
        reason = f" ({first_sentence(error)})" if error else ""
        try:
            for _ in range(_DIAGNOSIS_LOOKS):
                for rank in self.watched_ranks:
                    if self.store.check([f"failed/{rank}"]):
                        return Lost(f"rank {rank}: {self.store.get(f'failed/{rank}').decode()}")
                missing_rank = self.find_missing(_DIAGNOSIS_MISSED_SIGNS)
                if missing_rank is not None:
                    return Lost(f"rank {missing_rank} is gone: {RESTART}{reason}")
                time.sleep(self.interval)
        except RuntimeError:  # the store is gone: with rank 0, or with torchrun
            pass
        return Lost(f"another rank is gone, or has not answered in time: {RESTART}{reason}")

    @contextmanager
    def watch(self) -> Generator[None, None, None]:
        """While inside, give signs of life, and end this process, with a line and exit code 1, if a rank gives none."""
        is_over = threading.Event()
        threads = [
            threading.Thread(target=self._beat_until, args=(is_over,), daemon=True),
            threading.Thread(target=self._exit_if_missing, args=(is_over,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            for thread in threads:
                thread.join(2 * self.interval)

    def _beat_until(self, is_over: threading.Event) -> None:
        """Beat each interval; the work of the first thread."""
        while not is_over.wait(self.interval):
            try:
                self.beat()
            except RuntimeError:  # the store is gone, and so are ranks: the next collective will fail
                is_over.set()

    def _exit_if_missing(self, is_over: threading.Event) -> None:
        """Look each interval whether a rank, or the store, is gone; the work of the second thread."""
        num_signs_before = 0
        num_stuck_looks = 0  # looks during which `beat` has waited for the store
        while not is_over.wait(self.interval):
            num_signs = self._num_signs_given
            num_stuck_looks = 0 if num_signs != num_signs_before else num_stuck_looks + 1
            num_signs_before = num_signs
            missing_rank = self.find_missing(self.max_missed_signs)
            if num_stuck_looks >= self.max_missed_signs:
                missing_rank = 0  # whose process has the store
            if missing_rank is not None and self._exit_lock.acquire(blocking=False):
                self._exit(missing_rank)

    def _exit(self, missing_rank: int) -> NoReturn:
        """Say which rank is gone, and end this process. Rank 0 says it of others, rank 1 of rank 0."""
        if self.rank < 2:
            line = f"error: rank {missing_rank} has not answered for {self.limit:g} seconds (DUMO_TIMEOUT): {RESTART}"
            print(line, file=sys.__stderr__, flush=True)
        else:
            # torchrun ends all ranks once one has exited: let that be the one with the line
            time.sleep(_EXIT_DELAY_INTERVALS * self.interval)
        os._exit(1)


def first_sentence(error: BaseException) -> str:
    """The first sentence of torch's message, without the place in its code."""
    message = " ".join(str(error).split())
    message = re.sub(r"\[/\S+\] ?", "", message)
    return message.split(". ")[0][:_MAX_REASON_CHARACTERS]
