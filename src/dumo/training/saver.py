"""A thread that writes checkpoints while training continues: `Saver.start` begins, `Saver.wait` waits for its end.

A step waits until what is saved is copied to host memory; the thread writes, hashes and flushes that copy. One
checkpoint is written at a time. The memory of the copy is kept for the next one.

The threads of several ranks have a process group of their own, because collectives of the main threads would mix with
theirs.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from types import TracebackType

from torch import Tensor

from dumo.runtime import dist


class Saver:
    """Runs work in a thread, one piece after the other. Every rank has one, and must call it alike."""

    def __init__(self) -> None:
        """Nothing is written yet."""
        self.group = dist.new_group()
        self.memory = dict[tuple[str, str], Tensor]()  # of the copy, from one to the next
        self._work: Future[object] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the last work has failed: `wait` raises its error."""
        return self._work is not None and self._work.done() and self._work.exception() is not None

    def start(self, work: Callable[[], object]) -> None:
        """Start work once the one before is done. Raises the error of the one before."""
        self.wait()
        future = Future[object]()
        self._work = future

        def run() -> None:
            dist.group.set(self.group)  # of this thread
            try:
                future.set_result(work())
            except BaseException as error:
                # `wait` raises it in the main thread.
                future.set_exception(error)

        Thread(target=run, name="checkpoint", daemon=True).start()  # a process that ends at once does not wait for it

    def wait(self) -> None:
        """Wait until the work is done. Raises its error, once."""
        work = self._work
        if work:
            wait([work])  # an interrupt leaves it to be waited for again
            self._work = None
            work.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Wait, also after an error: the folder is free for another training then."""
        if error is None:
            self.wait()
            return
        # The error of training is raised, whatever becomes of the work.
        if self._work:
            wait([self._work])
