"""One rank without torch.distributed; two ranks train as one."""

from pathlib import Path

import torch

from dumo import dist
from unit.training.toy import python

RANK = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from dumo import dist
from meeting import meeting
from unit.training.toy import AVERAGES, Small, run, tensors
from dumo.training.loop import Every
from dumo.training.spec import Train
from dumo.training.state import begin

spec = Train(steps=3, batch=12, micro_batch=3, ema=AVERAGES, clip=0.5)
alone, together = [], []
whole = run(begin(Small(), spec), spec, hooks=[Every(1, lambda _, record: alone.append(record))])

store, rank = sys.argv[1], int(sys.argv[2])
with meeting(store, rank):
    assert (dist.rank(), dist.world(), dist.is_main()) == (rank, 2, rank == 0)
    x = torch.tensor([float(rank), 4.0])
    assert dist.mean(x).tolist() == [0.5, 4.0]
    assert x.tolist() == [rank, 4.0]

    state = begin(Small(), spec)
    state.net = DistributedDataParallel(state.net)
    run(state, spec, hooks=[Every(1, lambda _, record: together.append(record))])
    state.net = state.net.module
    for name, value in tensors(whole).items():
        if not name.endswith("passes"):
            torch.testing.assert_close(tensors(state)[name], value, rtol=0, atol=1e-12)
    for one, two in zip(alone, together, strict=True):
        assert (one.step, one.images, one.counts) == (two.step, two.images, two.counts)
        for a, b in [(one.loss, two.loss), (one.grad_norm, two.grad_norm), *zip(one.bins["pull"], two.bins["pull"])]:
            assert abs(a - b) < 1e-12 or a != a and b != b
    print("agrees")
"""


def test_one_rank() -> None:
    x = torch.tensor([1.0, 2.0])
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.mean(x), x)


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    processes = [python(RANK, str(tmp_path / "store"), str(rank)) for rank in range(2)]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
        assert out.splitlines()[-1] == "agrees"
