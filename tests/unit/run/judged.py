"""`main(RANK, FILE, FOLDER)` is one of two processes that train runs and judge them. They meet in FILE.

In each run one of them fails to make a batch of samples, or to judge one. See test_validation.py.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dumo.run import validation
from dumo.run.trained import TrainedRun
from dumo.runtime import dist
from dumo.training import agreement
from dumo.types import UserError
from meeting import meeting
from trained import train
from unit.run.known import tiny

WORDS = ("train.steps=3", "train.batch=4", "evaluate.every=2")
# What fails, with which error, and the error of each rank; None: it trains on without a score.
CASES: dict[str, tuple[str, Exception, tuple[type[Exception] | None, type[Exception] | None]]] = {
    "made": ("batch", UserError("no batch"), (None, None)),
    "judged": ("score", UserError("no score"), (None, None)),
    "broken": ("score", ValueError("a fault"), (RuntimeError, ValueError)),
}


class Judge:
    """Scores samples once all ranks have judged theirs, as an evaluator; on rank 1 it may fail."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def score(self, samples: Iterator[Any]) -> dict[str, float]:
        for _ in samples:
            if self.error and dist.rank() == 1:
                raise self.error
        return {"mmd": float(sum(agreement.gather_results(lambda: 1)))}


def failing(error: Exception) -> Callable[..., Iterator[object]]:
    """What makes batches of samples, and fails on rank 1."""
    make_batches: Callable[..., Iterator[object]] = TrainedRun.make_batches

    def make(*given: object, **more: object) -> Iterator[object]:
        if dist.rank() == 1:
            raise error
        yield from make_batches(*given, **more)

    return make


def judge(folder: Path, name: str) -> None:
    """Train the run of a case."""
    place, error, expected = CASES[name]
    judge = Judge(error if place == "score" else None)
    make_batches = failing(error) if place == "batch" else TrainedRun.make_batches
    kind = expected[dist.rank()]
    lines: list[str] = []
    with (
        patch.object(validation, "evaluator_of", lambda *of: judge),
        patch.object(TrainedRun, "make_batches", make_batches),
        pytest.raises(kind, match=str(error)) if kind else nullcontext(),
    ):
        state = train(tiny("moons", *WORDS), folder / name, print_line=lines.append, device="cpu")
        assert state.step == 3
        assert sum(f"step 2 is not judged: {error}" in line for line in lines) == dist.is_main()


def main(number: str, file: str, folder: str) -> None:
    """Train the run of each case."""
    with meeting(file, int(number)):
        for name in CASES:
            judge(Path(folder), name)
            print(f"{name} agrees", flush=True)
