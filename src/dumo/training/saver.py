"""Checkpoints that a thread writes while training goes on.

A step waits until what is saved is copied into host memory; the thread writes, hashes and flushes that copy. One is
written at a time. The memory of the copy is kept for the next one.

Threads of several ranks talk in a group of their own: what the main threads say meanwhile comes in any order to that.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext, suppress
from threading import Thread
from types import TracebackType

from torch import Tensor

from dumo.runtime import dist


class Saver:
    """Writes in a thread, one piece of work after the other. Every rank has one, and must call it alike."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self.group = dist.another()
        self.memory = dict[tuple[str, str], Tensor]()  # of the copy, from one to the next
        self._work: Future[object] | None = None

    @property
    def failed(self) -> bool:
        """Whether what was being written was not: `wait` raises why."""
        return self._work is not None and self._work.done() and self._work.exception() is not None

    def start(self, work: Callable[[], object]) -> None:
        """Begin, once what was begun before is done. Raises what that failed of."""
        self.wait()
        self._work = done = Future[object]()

        def write() -> None:
            dist.group.set(self.group)  # of this thread
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            except BaseException as error:  # raised where it is waited for, a SystemExit would end all with its code
                failure = RuntimeError(f"the thread that saves was ended by {error!r}")
                failure.__cause__ = error
                done.set_exception(failure)

        Thread(target=write, name="checkpoint", daemon=True).start()  # who ends at once does not wait for it

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what went wrong, once."""
        work = self._work
        if work:
            wait([work])  # an interrupt leaves it to be waited for again
            self._work = None
            work.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Wait, whatever else went wrong: the folder is free for another training then."""
        with suppress(Exception) if error else nullcontext():  # of two errors the first is raised
            self.wait()
