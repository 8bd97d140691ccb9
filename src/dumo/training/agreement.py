"""Run functions on all ranks such that an error on one rank is raised on all ranks.

`gather_results` returns the results of all ranks on every rank, `on_each_rank` returns each rank's own result, and
`on_main_rank` returns the result of rank 0. Without this, the other ranks would wait for the failed rank in their next
collective.
"""

import errno
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed

from dumo.io import file as files
from dumo.runtime import dist, signals
from dumo.types import UserError

T = TypeVar("T")


def gather_results(work: Callable[[], T], *, is_long: bool = False) -> list[T]:
    """Call `work` on every rank and return the results of all ranks, by rank. Every rank must call it.

    Set `is_long` if `work` may take longer than the timeout of a collective. Results are sent to all ranks, so they
    must be small. An error is raised unchanged on the rank where it occurs. The other ranks raise UserError, Stopped
    and OSError with the same type, and any other error as a RuntimeError that names the rank.
    """
    if dist.world() == 1:
        return [work()]
    try:
        result = work()
    except BaseException as error:
        # The other ranks wait for this one, whatever the error is.
        _exchange((None, sendable_error(error)), is_long=is_long)
        raise
    outcomes = _exchange((result, None), is_long=is_long)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def _exchange(outcome: object, *, is_long: bool) -> list[Any]:
    """Send an outcome to all ranks, and return the outcomes of all ranks."""
    if is_long:
        dist.wait_for_all()
    outcomes: list[Any] = [None] * dist.world()
    torch.distributed.all_gather_object(outcomes, outcome, dist.group.get())
    return outcomes


def on_each_rank(work: Callable[[], T]) -> T:
    """Call `work` on every rank and return this rank's result, which is not sent. Errors as in `gather_results`."""
    results: list[T] = []
    gather_results(lambda: results.append(work()))
    return results[0]


def on_main_rank(work: Callable[[], T], *, is_long: bool = False) -> T:
    """Call `work` on rank 0 only and return its result on all ranks. Errors as in `gather_results`."""
    results = gather_results(lambda: work() if dist.is_main() else None, is_long=is_long)
    return cast(T, results[0])


def sendable_error(error: BaseException) -> Exception:
    """Return the error that the other ranks raise. It must be picklable."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, signals.Stopped):
        return signals.Stopped(error.number, str(error))
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        return OSError(error.errno, error.strerror or str(error), file)
    if files.is_disk_full(error):
        return OSError(errno.ENOSPC, str(error))
    return RuntimeError(f"rank {dist.rank()}: {type(error).__name__}: {error}")
