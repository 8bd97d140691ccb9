"""Gradients of a net that is compiled, replicated or sharded, against those of the same net as it is. See test_rank.py.

`main(RANK, FILE, WHAT)` is one of two processes that train together, and meet in FILE: WHAT is a key of CASES. With
`alone` for RANK it is alone. Prints one JSON object per case. A process of its own: shapes are checked in the tests',
and a compiler cannot see through the checks.
"""

import copy
import json
import warnings
from collections.abc import Callable

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from contract.case import name as named
from contract.case import objectives
from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.path import Linear, Trig
from dumo.flow.slope import DualSlope
from dumo.nets import DiT
from dumo.objectives import DuMo, MeanFlow, Objective, Several
from dumo.testing.network import randomise
from dumo.types import Frozen, Net, NoisyBatch, frozen
from meeting import meeting

ROWS, CLASSES, SHAPE = 16, 3, (4, 8, 8)


def plain(net: nn.Module) -> nn.Module:
    return net


def compiled(net: nn.Module, backend: str = "aot_eager") -> nn.Module:
    """Graphs are caught, and their backward passes made, by the parts that all backends share."""
    for block in net.blocks:
        block.compile(fullgraph=True, backend=backend)
    return net


def inductor(net: nn.Module) -> nn.Module:
    """The backend that training takes, which also writes code: minutes where many nets are compiled."""
    return compiled(net, "inductor")


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def fsdp(net: nn.Module, reshard: bool = False) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, reshard_after_forward=reshard)
    return fully_shard(net, reshard_after_forward=reshard)


def resharded(net: nn.Module) -> nn.Module:
    return fsdp(net, reshard=True)


def both(net: nn.Module) -> nn.Module:
    """Regional compilation as large trainers do it: each block compiled, then sharded."""
    return fsdp(compiled(net))


OBJECTIVES = {
    "deferred": DuMo(slope=DualSlope(), guide=Guide(zeta=0.5)),
    "deferred, three heads": Several(slope=DualSlope(), guide=Guide(zeta=0.5)),
    "fused": DuMo(slope=DualSlope(), guide=Guide()),
    "fused, some rows": MeanFlow(slope=DualSlope()),
}


CUTTING = ("deferred, three heads", "fused, some rows")  # those that cut the rows
WRAPPERS = {ddp: (*OBJECTIVES,), fsdp: (*OBJECTIVES,), resharded: (*OBJECTIVES,), both: CUTTING}
# DMD2 trains one of its two networks in a step, which DDP refuses: unit/training/test_trained_ranks.py trains it.
ALL = [o for o in objectives() if not o.needs.fake_score]
EVERY = {named(o): o for o in ALL if o.needs.slope in (None, DualSlope())}
CASES = {  # of two ranks, by the word that asks for them: what is wrapped, and how
    "few": [(wrap, name) for wrap in WRAPPERS for name in CUTTING],
    "wrappers": [(wrap, name) for wrap, names in WRAPPERS.items() for name in names],
    "objectives": [(ddp, name) for name in EVERY],
}


def record(objective: Objective, rank: int, ranks: int) -> NoisyBatch:
    """This rank's rows of the one batch."""
    g = torch.Generator().manual_seed(3)
    x, c = torch.randn(ROWS, *SHAPE, generator=g), torch.arange(ROWS) % CLASSES
    share = ROWS // ranks
    mine = slice(rank * share, (rank + 1) * share)
    path = Trig() if objective.needs.formulas.paths == ("trig",) else Linear()
    return draw(
        objective, path, x[mine], c[mine], CLASSES, seed=0, step=1, batch=ROWS, first=mine.start, teacher=path_velocity
    )


def gradient(net: Net, module: nn.Module, objective: Objective, b: NoisyBatch) -> Tensor:
    """Of the mean loss, all parameters in one vector; twice, so that what a step leaves behind is seen."""
    for _ in range(2):
        module.zero_grad()
        objective.loss(net, frozen(net), b).loss.mean().backward()
    grads = (p.grad for p in module.parameters())
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in grads])


def compare(wrap: Callable[[nn.Module], nn.Module], name: str, rank: int, ranks: int) -> dict[str, object]:
    """One objective in one wrapper: error of the gradient, way of the slope, what it said, graphs compiled."""
    objective = OBJECTIVES.get(name) or EVERY[name]
    one = randomise(DiT(patch=2, width=32, depth=2, attention=2).build(objective.needs, SHAPE, CLASSES))
    wanted = gradient(one, one, objective, record(objective, 0, 1))
    module = copy.deepcopy(one)
    net = wrap(module)
    way = None
    if name in OBJECTIVES:
        way = objective.slope.strategy(net, Frozen(module), known=name.startswith("fused")).name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = gradient(net, module, objective, record(objective, rank, ranks))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return {
        "case": name,
        "net": wrap.__name__,
        "way": way,
        "error": ((found - wanted).norm() / wanted.norm()).item(),
        "said": [str(w.message) for w in said if "du/dt" in str(w.message)],
        "graphs": graphs,
    }


def main(rank: str, file: str = "", what: str = "") -> None:
    """Compare all cases of `what`."""
    torch.set_num_threads(1)
    if rank == "alone":
        print(json.dumps(compare(inductor, "deferred", 0, 1)))
        for name in OBJECTIVES:
            print(json.dumps(compare(compiled, name, 0, 1)))
        return
    with meeting(file, int(rank)):
        for wrap, name in CASES[what]:
            row = compare(wrap, name, int(rank), 2)
            if rank == "0":
                print(json.dumps(row))
