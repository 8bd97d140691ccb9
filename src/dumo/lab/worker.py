"""Do pieces of work in processes of their own, several at a time. One that diverges, or is killed, fails alone.

`run_side_by_side` is the entrance. In this order it

1. starts as many processes (`Worker`) as may run at a time, and sends each a piece;
2. waits for reports, yields each piece that is done or failed, and sends that worker the next piece, or a new worker
   where one was killed;
3. ends and joins all processes, also after an error or a signal.

A worker's process runs `serve`: it does a piece and reports, until its pipe ends or a signal comes.

The executors of the standard library do not say which piece a killed process did, and drop all the rest; and they pass
on no signal.
"""

import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from dumo.error import NotFiniteError
from dumo.runtime import door, signals
from dumo.runtime.heartbeat import Lost
from dumo.training.state import Diverged

T = TypeVar("T")
Failure = Lost | Diverged | NotFiniteError  # of one piece, which says nothing of the others
POLL_SECONDS = 0.2  # between two looks for a signal: ours
process_context = get_context("spawn")  # a fork would copy threads and locks of torch


class Worker:
    """A process that does one piece of work after another."""

    def __init__(self, work: Callable[[T], object], threads: int, gpu: int | None = None) -> None:
        """Start the process, which gives torch this number of threads, and makes this GPU the current one.

        Its messages name options as this one's do.
        """
        self.gpu = gpu
        self.pipe, worker_end = process_context.Pipe()
        arguments = (work, worker_end, threads, gpu, door.at_command_line)
        self.process = process_context.Process(target=serve, args=arguments)
        with _safe_path():
            self.process.start()
        worker_end.close()  # so that the pipe ends with the process
        self.piece: object = None

    def send(self, piece: object) -> None:
        """Give the process a piece of work."""
        self.piece = piece
        with suppress(BrokenPipeError):  # the process was killed, as `receive` reports
            self.pipe.send(piece)

    def receive(self) -> Exception | None:
        """Wait until the piece is done; return its error, or None. The error is `Lost` where the process was killed."""
        try:
            error, trace = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Lost(f"its process {_exit_text(self.process.exitcode or 0)}")
        if error is not None:
            error.__cause__ = RuntimeError(trace)  # the trace in the other process
        return error


@contextmanager
def _safe_path() -> Generator[None, None, None]:
    """Inside, a Python that starts imports no module of the working folder, as with -P.

    Once it has started, multiprocessing gives it this process's own path.
    """
    previous = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = previous


def _exit_text(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    text = f"was ended by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        text += ", as where memory is used up"
    return text


def serve(work: Callable[[T], object], pipe: Connection, threads: int, gpu: int | None, at_command_line: bool) -> None:
    """Do each piece that comes through the pipe, and report (error or None, trace), until it ends or a signal comes.

    `gpu` is the number of the GPU that device `auto` means; None: torch's first. `at_command_line` says whether
    messages name options as one types them in a shell.
    """
    torch.set_num_threads(threads)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    door.at_command_line = at_command_line
    with suppress(EOFError, OSError, KeyboardInterrupt), signals.listening(child=True):
        while signals.poll() is None:
            if not pipe.poll(POLL_SECONDS):
                continue
            piece = pipe.recv()
            try:
                work(piece)
                pipe.send((None, ""))
            except Exception as error:
                pipe.send((error, traceback.format_exc()))


def run_side_by_side(
    work: Callable[[T], object], pieces: Sequence[T], *, jobs: int, threads: int, num_gpus: int = 0
) -> Iterator[tuple[T, Failure | None]]:
    """Do `work` of each piece, `jobs` at a time; yield each when it is done, or has failed alone.

    Processes are spread over the first `num_gpus` GPUs; 0: none is made a process's own.

    Raises any other error of a piece, and Stopped after a signal, once the other processes have been ended.
    `work` and the pieces go to other processes, so they must be picklable.
    """
    waiting_pieces = list(pieces)[::-1]
    workers: list[Worker] = []
    try:
        while waiting_pieces or workers:
            while waiting_pieces and len(workers) < jobs:
                gpus_in_use = [worker.gpu for worker in workers]
                gpu = min(range(num_gpus), key=gpus_in_use.count, default=None)
                worker = Worker(work, threads, gpu)
                workers.append(worker)
                worker.send(waiting_pieces.pop())
            signals.check()
            ready_pipes = connection.wait([worker.pipe for worker in workers], POLL_SECONDS)
            ready_workers = [worker for worker in workers if worker.pipe in ready_pipes]
            for worker in ready_workers:
                error = worker.receive()
                piece = worker.piece
                if error is not None and not isinstance(error, Failure):
                    raise error
                if waiting_pieces and not isinstance(error, Lost):
                    worker.send(waiting_pieces.pop())
                else:  # there is no more work, or the process was killed
                    workers.remove(worker)
                    _end([worker])
                yield piece, error  # pyright: ignore[reportReturnType], a T that was sent
    finally:
        _end(workers)


def _end(workers: Sequence[Worker]) -> None:
    """Stop workers and wait for their processes. A second Ctrl-C kills them."""
    try:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.pipe.close()
