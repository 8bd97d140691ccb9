"""What a step sends, counted on a fake group: `main(RANKS)`. See test_collective.py.

Prints a JSON object per case. A process of its own, for torch has one group of all processes at a time.
"""

import json
import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dumo.config.load import load
from dumo.run.net import make_flow
from dumo.run.weights import build
from dumo.training.state import begin
from trained import ToyTrainer

BATCH = 64
SLOPES = ("dual", "jvp", "central")
NAMES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "scatter", "allreduce_": "reduce"}


class Sent(TorchDispatchMode):
    """Counts what torch's sharding asks of the group, and the bytes of the larger side; not what is sent in return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        space, name, *_ = str(op).split(".")
        if space == "c10d":
            self.calls[NAMES[name]] += 1
            self.bytes[NAMES[name]] += max(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
        return op(*args, **(kwargs or {}))


def count(slope: str, share: int, reshard: bool, micro_batch: int | None) -> dict[str, object]:
    """One step of the digits recipe, guided; of two blocks where shards are few, and so hardly padded."""
    guided = ["objective.guide.zeta=0.5", f"objective.slope.kind={slope}"]
    cut = [f"train.share={share}", f"train.reshard={reshard}", f"train.micro_batch={micro_batch or 'null'}"]
    spec = load("digits", [*guided, *cut, f"train.batch={BATCH}", f"net.depth={2 if share < 64 else 4}"])
    net = build(spec)
    size = sum(p.numel() for p in net.parameters()) * 4
    state = begin(net, spec.train)
    trainer = ToyTrainer(state, make_flow(spec, state), spec.train)
    batch = spec.data.open().batch(0, spec.train.batch, 0, trainer.rows)
    with Sent() as sent:
        trainer.step(batch)
    return {
        "slope": slope,
        "share": share,
        "reshard": reshard,
        "passes": len(trainer.micro_batches),
        "groups": len(state.net.blocks) + 1,  # what is sent together: a block, and the rest of the net
        "calls": sent.calls,
        "copies": {name: number / size for name, number in sent.bytes.items()},  # in units of all weights
    }


def main(ranks: str) -> None:
    """All cases of so many ranks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # 'dual' says that it makes a pass of its own where weights are given back
    world = int(ranks)
    if world > 1:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    for share in sorted({1, min(2, world), world}):
        for reshard in {False, share > 1}:
            for slope in SLOPES if reshard and world < 64 else SLOPES[:1]:  # only then each pass gathers
                print(json.dumps(count(slope, share, reshard, None)))
    if world in (2, 8):  # a quarter of a rank's rows a pass
        for share in (1, world):
            print(json.dumps(count("dual", share, False, BATCH // world // 4)))
    if world > 1:
        torch.distributed.destroy_process_group()
