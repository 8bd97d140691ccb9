"""Work that all ranks do together: what fails on one rank fails on all, with the same error."""

import errno
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed

from dumo.io import file as files
from dumo.runtime import dist, signals
from dumo.types import UserError

T = TypeVar("T")


def agreed(work: Callable[[], T]) -> list[T]:
    """Call `work` on every rank and return the results of all, by rank. Every rank must call it.

    Results are sent to all ranks, so they must be small. An error on one rank is raised on all: a UserError, Stopped or
    OSError as such, any other as a RuntimeError that names the rank. One process raises it unchanged.
    """
    if dist.world() == 1:
        return [work()]
    found: T | None = None
    failure: Exception | None = None
    cause: Exception | None = None
    try:
        found = work()
    except Exception as error:  # the other ranks wait for this one, whatever the error is
        cause, failure = error, packed(error)
    answers: list[Any] = [None] * dist.world()
    torch.distributed.all_gather_object(answers, (found, failure), dist.group.get())
    for rank, (_, wrong) in enumerate(answers):
        if wrong is not None:
            raise (RuntimeError(f"rank {rank}: {wrong}") if type(wrong) is RuntimeError else wrong) from cause
    return [answer for answer, _ in answers]


def own(work: Callable[[], T]) -> T:
    """Call `work` on every rank and return the result of this one, which may be large. Raises as `agreed`."""
    found: list[T] = []
    agreed(lambda: found.append(work()))
    return found[0]


def main(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 alone and return its result on all ranks. Raises as `agreed`."""
    first, *_ = agreed(lambda: work() if dist.is_main() else None)
    return cast(T, first)


def packed(error: Exception) -> Exception:
    """An error as all ranks raise it, made of plain values, for it is sent to them."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, signals.Stopped):
        return signals.Stopped(error.number, str(error))
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        return OSError(error.errno, error.strerror or str(error), file)
    if files.full(error):
        return OSError(errno.ENOSPC, str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
