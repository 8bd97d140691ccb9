"""One rank without torch.distributed; two ranks train as one."""

import pytest
import torch

from dumo.runtime import dist
from dumo.types import UserError

RANK = """
import sys, torch
from dumo.runtime import dist
from dumo.training.layout import whole
from meeting import meeting
from unit.training.toy import AVERAGES, Small, run, tensors
from dumo.training.loop import Every
from dumo.training.spec import Train
from dumo.training.state import begin

spec = Train(steps=3, batch=12, micro_batch=6, ema=AVERAGES, clip=0.5)
alone = []
one = tensors(run(begin(Small(), spec), spec, hooks=[Every(1, lambda _, record: alone.append(record))]))

store, rank = sys.argv[1], int(sys.argv[2])
with meeting(store, rank):
    assert (dist.rank(), dist.world(), dist.is_main()) == (rank, 2, rank == 0)
    x = torch.tensor([float(rank), 4.0])
    assert dist.mean(x).tolist() == [0.5, 4.0]
    assert x.tolist() == [rank, 4.0]
    assert [part.tolist() for part in dist.gathered(torch.arange(rank))] == [[], [0]]

    for share in (1, 2):
        again, together = spec.model_copy(update={"share": share}), []
        state = run(begin(Small(), again), again, hooks=[Every(1, lambda _, record: together.append(record))])
        for name, value in tensors(state).items():
            if not name.endswith("passes"):
                torch.testing.assert_close(whole(value), one[name], rtol=0, atol=1e-12)
        for a, b in zip(alone, together, strict=True):
            assert (a.step, a.images, a.counts) == (b.step, b.images, b.counts)
            for c, d in [(a.loss, b.loss), (a.grad_norm, b.grad_norm), *zip(a.bins["pull"], b.bins["pull"])]:
                assert abs(c - d) < 1e-12 or c != c and d != d
    print("agrees")
"""


def test_one_rank() -> None:
    x = torch.tensor([1.0, 2.0])
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.mean(x), x)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x is no whole number from 1 to 1,000,000"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no"),
        ({"WORLD_SIZE": "1000000000"}, "WORLD_SIZE=1000000000 is no"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is no whole number from 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is no whole number from 0 to 1"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5 is no"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "٢"}, "LOCAL_WORLD_SIZE=٢ is no"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no whole number from 1 to 65,535"),
        ({"WORLD_SIZE": "2", "DUMO_TIMEOUT": "soon"}, "DUMO_TIMEOUT=soon is no number of seconds"),
        ({"WORLD_SIZE": "2", "DUMO_TIMEOUT": "nan"}, "DUMO_TIMEOUT=nan is no number of seconds"),
    ],
)
def test_odd_numbers_of_ranks_are_refused(told: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said), dist.join():
        pass


@pytest.mark.parametrize("name", ["hpu", "xla", "privateuseone", "cpu:x", ""])
def test_devices_that_are_not_here_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not available: use auto or cpu"):
        dist.device(name)
