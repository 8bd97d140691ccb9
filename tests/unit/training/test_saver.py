"""A checkpoint is written behind the steps that follow, as of its own, one at a time, and what goes wrong is raised."""

import time
from pathlib import Path
from threading import Event, Timer

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dumo.io import shards
from dumo.plan.cluster import fake_ranks
from dumo.training import checkpoint
from dumo.training.manifest import Checkpoints
from dumo.training.saver import Saver
from dumo.training.spec import Train
from dumo.training.state import begin
from unit.training.by_path import restore
from unit.training.toy import AVERAGES, Small, run, same, tensors, trained

SPEC = Train(steps=3, batch=12, ema=AVERAGES)
SECONDS = 30.0


def test_what_is_written_is_of_its_step(tmp_path: Path) -> None:
    """Weights, averages and moments move in place before it is written; the next copy takes the same memory."""
    state, saver, free = trained(), Saver(), Event()

    def begun() -> dict[str, torch.Tensor]:
        copy = checkpoint.copy(state, checkpoint.CheckpointNotes(), saver.memory)

        def write() -> None:
            assert free.wait(SECONDS)
            checkpoint.save_copy(Checkpoints(tmp_path), copy, 9)

        saver.start(write)
        return tensors(state)

    with saver:
        was = begun()
        run(state, SPEC.model_copy(update={"steps": 5}))
        assert not any(tmp_path.iterdir())
        free.set()
        saver.wait()
        places = {key: x.data_ptr() for key, x in saver.memory.items()}
        then = begun()
    assert {key: x.data_ptr() for key, x in saver.memory.items()} == places
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
        found = shards.parts_to_write(x)
    assert sum(x[name].to_local().numel() for name in found) == pytest.approx(52 * 3, abs=6)
    assert {*found.values()} == {(0, 0)}


def test_one_at_a_time() -> None:
    done, free, saver = list[int](), Event(), Saver()
    with saver:
        saver.start(lambda: (free.wait(SECONDS), done.append(1)))
        Timer(0.1, free.set).start()
        saver.start(lambda: done.append(2 * len(done)))
    assert done == [1, 2]


def test_an_error_is_raised_once() -> None:
    def fail() -> None:
        raise OSError(28, "full")

    saver = Saver()
    saver.start(fail)
    late = time.monotonic() + 60
    while not saver.has_failed and time.monotonic() < late:
        pass
    with pytest.raises(OSError, match="full"):
        saver.start(fail)
    assert not saver.has_failed
    with pytest.raises(OSError, match="full"), saver:
        saver.start(fail)
    saver.wait()


@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt("first")])
def test_an_error_of_training_waits_for_what_is_written(error: BaseException) -> None:
    done, saver = list[int](), Saver()

    def last() -> None:
        Event().wait(0.2)
        done.append(1)
        raise OSError(28, "full")

    def fail() -> None:
        with saver:
            saver.start(last)
            raise error

    with pytest.raises(type(error), match="first"):
        fail()
    assert done == [1]
