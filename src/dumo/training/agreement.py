"""Work of which no rank goes on alone: what fails on one fails on all, in the same words."""

import errno
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed

from dumo import dist, stop
from dumo.io import file as files
from dumo.types import UserError

T = TypeVar("T")
Failure = tuple[str, int, str, str | None]  # its kind, the system's number of it, what it says, of which file


def agreed(work: Callable[[], T]) -> list[T]:
    """What `work` gives on every rank, by rank: small values, for all are sent to all. Every rank must call it.

    What it raises on one rank, all raise: UserError as it is, what the system refused as OSError, the rest as
    RuntimeError that names the rank. On one process: all as it is.
    """
    if dist.world() == 1:
        return [work()]
    found: T | None = None
    failure: Failure | None = None
    cause: Exception | None = None
    try:
        found = work()
    except Exception as error:  # whatever it is, the others wait for word of it
        cause, failure = error, told(error)
    answers: list[Any] = [None] * dist.world()
    torch.distributed.all_gather_object(answers, (found, failure))
    for rank, (_, wrong) in enumerate(answers):
        if wrong is not None:
            raise raised(rank, *wrong) from cause
    return [answer for answer, _ in answers]


def own(work: Callable[[], T]) -> T:
    """What `work` gives on this rank, which need not be small, once it is done on all. Raises as `agreed`."""
    found: list[T] = []
    agreed(lambda: found.append(work()))
    return found[0]


def main(work: Callable[[], T]) -> T:
    """Let the first rank do this while the others wait; what it gave, on all. Raises as `agreed`."""
    first, *_ = agreed(lambda: work() if dist.is_main() else None)
    return cast(T, first)


def told(error: Exception) -> Failure:
    """An error in words and numbers, for other ranks."""
    if isinstance(error, UserError):
        return "user", 0, str(error), None
    if isinstance(error, stop.Stopped):
        return "stopped", error.number, str(error), None
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        return "system", error.errno, error.strerror or str(error), file
    if files.full(error):
        return "system", errno.ENOSPC, str(error), None
    return "other", 0, f"{type(error).__name__}: {error}", None


def raised(rank: int, kind: str, number: int, text: str, file: str | None) -> Exception:
    """The error that a rank told."""
    if kind == "user":
        return UserError(text)
    if kind == "stopped":
        return stop.Stopped(number, text)
    return OSError(number, text, file) if kind == "system" else RuntimeError(f"rank {rank}: {text}")
