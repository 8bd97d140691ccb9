"""Batches made ahead are those that were asked for, in the order asked, of bounded number; errors come as they are."""

import threading
from threading import Barrier, Event, Lock

import pytest
import torch
from torch import Tensor

from dumo.training.prefetch import BATCHES_AHEAD, Prefetch
from dumo.types import UserError

LAST = 10


def threads() -> set[str]:
    """Those that make batches."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("ahead", "decode"))}


class Made:
    """Batches that are their steps; which were made."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.lock, self.came = Lock(), Event()

    def __call__(self, step: int) -> list[Tensor]:
        with self.lock:
            self.steps.append(step)
        self.came.set()
        return [torch.tensor([step])]

    def wait(self, count: int) -> list[int]:
        """The first so many that were made, sorted."""
        while len(self.steps) < count:
            self.came.wait(1)
            self.came.clear()
        return sorted(self.steps)


def test_so_many_are_made_ahead_and_no_more() -> None:
    """However long the step takes, and none behind the last."""
    make = Made()
    with Prefetch(make, last=LAST, depth=BATCHES_AHEAD) as batches:
        batches(0)
        assert make.wait(1 + BATCHES_AHEAD) == list(range(1 + BATCHES_AHEAD))
        batches(1)
        assert make.wait(2 + BATCHES_AHEAD) == list(range(2 + BATCHES_AHEAD))
        assert len(batches.futures) == BATCHES_AHEAD
        batches(LAST - 1)
        assert not batches.futures
    assert max(make.steps) == LAST - 1


def test_several_are_made_at_once() -> None:
    """They wait for each other, so one thread would wait for ever."""
    meet, make = Barrier(BATCHES_AHEAD), Made()

    def late(step: int) -> list[Tensor]:
        if 1 <= step <= BATCHES_AHEAD:
            meet.wait(timeout=60)
        return make(step)

    with Prefetch(late, last=LAST, depth=BATCHES_AHEAD) as batches:
        assert [batches(step)[0].item() for step in range(1 + BATCHES_AHEAD)] == list(range(1 + BATCHES_AHEAD))


@pytest.mark.parametrize("asked", [[0, 5, 1, 1, 9, 0], [9, 8, 7], [3, 3, 3], [12, 0]])
def test_any_step_may_be_asked_for(asked: list[int]) -> None:
    """Back and forth, again, and behind the last."""
    with Prefetch(Made(), last=LAST, depth=BATCHES_AHEAD) as batches:
        assert [int(batches(step)[0]) for step in asked] == asked


def test_errors_come_as_they_are_at_their_step() -> None:
    """Not before: the steps up to there are made. What never is asked for fails nothing."""

    def make(step: int) -> list[Tensor]:
        if step in (2, 5):
            raise UserError(f"image {step} cannot be read")
        return [torch.tensor([step])]

    with Prefetch(make, last=LAST, depth=BATCHES_AHEAD) as batches:
        assert [int(batches(step)[0]) for step in (0, 1)] == [0, 1]
        with pytest.raises(UserError, match="image 2 cannot be read"):
            batches(2)
        assert int(batches(3)[0]) == 3
    assert not threads()


def fail(batches: Prefetch, error: BaseException) -> None:
    batches(0)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("diverged"), UserError("no")])
def test_no_thread_is_left(error: BaseException) -> None:
    """Whatever ends the steps, also amid what is being made."""
    with pytest.raises(type(error)), Prefetch(Made(), last=LAST, depth=BATCHES_AHEAD) as batches:
        fail(batches, error)
    assert not threads()
    assert batches.executor._shutdown


def test_what_is_made_ahead_leaves_the_cores_to_the_step() -> None:
    """A second team of OpenMP's takes them, for it spins."""
    before = torch.get_num_threads()
    with Prefetch(lambda step: torch.get_num_threads(), last=4, depth=2) as threads:
        assert [threads(step) for step in range(4)] == [1] * 4
    assert torch.get_num_threads() == before
