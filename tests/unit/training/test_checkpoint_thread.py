"""A checkpoint is written behind the steps that follow, as of its own, one at a time, and what goes wrong is raised."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dumo.plan.cluster import fake_ranks
from dumo.training.checkpoint import Checkpoints, assign_tensors
from dumo.training.duration import Duration
from dumo.training.settings import Train
from dumo.training.state import begin
from unit.training.by_path import restore
from unit.training.toy import AVERAGES, Small, run, same, tensors, trained

SPEC = Train(steps=3, batch=12, ema=AVERAGES)
SECONDS = 30.0


def test_what_is_written_is_of_its_step(tmp_path: Path) -> None:
    """Weights, averages and moments move in place before it is written; the next copy takes the same memory."""
    state, free = trained(), Event()

    def begun() -> dict[str, torch.Tensor]:
        checkpoints.save(state, keep=9, before=lambda: free.wait(SECONDS))
        return tensors(state)

    with Checkpoints(tmp_path) as checkpoints:
        was = begun()
        state.duration = Duration(5)
        run(state, SPEC.model_copy(update={"steps": 5}))
        assert not any(tmp_path.iterdir())
        free.set()
        checkpoints.wait()
        places = {key: x.data_ptr() for key, x in checkpoints._memory.items()}
        then = begun()
    assert {key: x.data_ptr() for key, x in checkpoints._memory.items()} == places
    for step, wanted in ((3, was), (5, then)):
        restore(tmp_path / f"step-{step:08d}", new := begin(Small(1), SPEC))
        assert (new.step, new.images) == (step, 12 * step)
        assert same(tensors(new), wanted)


@pytest.mark.parametrize("share", [1, 2, 4])
def test_what_ranks_hold_alike_they_share_out(share: int) -> None:
    """Each of four copies a quarter, however many hold the same."""
    with fake_ranks(4):
        mesh = init_device_mesh("cpu", (4 // share, share))
        places = [Replicate(), Shard(0)]
        x = {f"{n}": distribute_tensor(torch.zeros(4 * n, 3), mesh, places) for n in (10, 9, 8, 7, 6, 5, 4, 3)}
        found = assign_tensors(x)
    assert sum(x[name].to_local().numel() for name in found) == pytest.approx(52 * 3, abs=6)
    assert {*found.values()} == {(0, 0)}


def save(checkpoints: Checkpoints, step: int, before: Callable[[], object], after: Callable[[], object]) -> None:
    """Save a state as of this step, and call these functions in the thread."""
    state = trained()
    state.step = step
    checkpoints.save(state, keep=9, before=before, after=after)


def test_one_at_a_time(tmp_path: Path) -> None:
    done, free = list[int](), Event()
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, lambda: free.wait(SECONDS), lambda: done.append(1))
        Timer(0.1, free.set).start()
        save(checkpoints, 2, lambda: None, lambda: done.append(2 * len(done)))
    assert done == [1, 2]


def fail() -> None:
    raise OSError(28, "full")


def test_an_error_is_raised_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, fail, fail)
    late = time.monotonic() + 60
    while not checkpoints.has_failed and time.monotonic() < late:
        pass
    with pytest.raises(OSError, match="full"):
        save(checkpoints, 2, fail, fail)
    assert not checkpoints.has_failed
    with pytest.raises(OSError, match="full"), checkpoints:
        save(checkpoints, 2, fail, fail)
    checkpoints.wait()


@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt("first")])
def test_an_error_of_training_waits_for_what_is_written(tmp_path: Path, error: BaseException) -> None:
    done = list[int]()

    def last() -> None:
        Event().wait(0.2)
        done.append(1)
        fail()

    def train() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            save(checkpoints, 1, last, fail)
            raise error

    with pytest.raises(type(error), match="first"):
        train()
    assert done == [1]
