"""Work that all ranks do together: what fails on one rank fails on all, with the same error.

`gather_results` gives every rank the results of all, `on_each_rank` each its own, and `on_main_rank` all of them that
of rank 0. Without this, the ranks that did not fail would wait for the failed one in their next collective.
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
    """Call `work` on every rank and return the results of all, by rank. Every rank must call it.

    `is_long`: it may take longer on one rank than a collective waits. Results are sent to all ranks, so they must be
    small. An error is raised unchanged on the rank where it occurs. The others raise a UserError, Stopped or OSError as
    such, any other as a RuntimeError that names the rank.
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
    """Send an outcome to all ranks, and return those of all."""
    if is_long:
        dist.wait_for_all()
    outcomes: list[Any] = [None] * dist.world()
    torch.distributed.all_gather_object(outcomes, outcome, dist.group.get())
    return outcomes


def on_each_rank(work: Callable[[], T]) -> T:
    """Call `work` on every rank and return this rank's result, which may be large. Raises as `gather_results`."""
    results: list[T] = []
    gather_results(lambda: results.append(work()))  # the result itself is not sent
    return results[0]


def on_main_rank(work: Callable[[], T], *, is_long: bool = False) -> T:
    """Call `work` on rank 0 alone and return its result on all ranks. Takes and raises as `gather_results`."""
    results = gather_results(lambda: work() if dist.is_main() else None, is_long=is_long)
    return cast(T, results[0])


def sendable_error(error: BaseException) -> Exception:
    """The error that the other ranks raise: of plain values, because it is pickled."""
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
