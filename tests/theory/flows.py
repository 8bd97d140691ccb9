"""`dumo.Flow` on two ranks, against one process that has the whole batch. See test_flow_rank.py.

`main(RANK, FILE)` is one of two processes that train together, and meet in FILE. Prints one JSON object per case.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dumo
from contract.own import Encoder, Perceptron, UNet
from dumo.flow.module import Flow
from dumo.objectives import MeanFlow
from dumo.types import Needs, UserError
from meeting import meeting

CLASSES = 3
STEPS = 2  # so that what a step leaves behind is seen
Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Gradient:
    """How far the two ranks' gradient is from that of one process, and the loss on this rank."""

    case: str
    error: float
    loss: float
    why: str


def plain(net: nn.Module) -> nn.Module:
    return net


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="aot_eager")  # pyright: ignore[reportReturnType]


def sharded(net: nn.Module) -> nn.Module:
    fully_shard(net, reshard_after_forward=False)
    return net


def resharded(net: nn.Module) -> nn.Module:
    fully_shard(net, reshard_after_forward=True)
    return net


def replicated_and_compiled(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(compiled(net))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: Perceptron(Needs(heads=("v", "u")), CLASSES), (2,)),
    "two times": (lambda: Perceptron(MeanFlow().needs, CLASSES), (2,)),
    "unet": (lambda: UNet(CLASSES), (1, 8, 8)),
    "encoder": (lambda: Encoder(0.0), (1, 8, 8)),
}
OBJECTIVES = {"two times": "meanflow"}  # of other nets dumo
ROWS = {"two times": 4}  # of other nets 8; of these, one has r < t, on the first rank
OF_NET: dict[str, Wrap] = {
    "plain": plain,
    "replicated": DistributedDataParallel,
    "sharded": sharded,
    "resharded": resharded,
    "compiled": compiled,
    "replicated and compiled": replicated_and_compiled,
}
OF_FLOW: dict[str, Wrap] = {"plain": plain, "replicated": DistributedDataParallel}
FEW = [
    ("perceptron", "plain", "replicated"),
    ("unet", "replicated", "plain"),
    ("encoder", "resharded", "plain"),
    ("two times", "resharded", "plain"),
]
ALL = [
    (net, of_net, of_flow)
    for net in NETS
    for of_net in OF_NET
    for of_flow in OF_FLOW
    if of_flow == "plain" or of_net in ("plain", "compiled")  # replicated once
]
CASES = {"few": FEW, "all": ALL}


def data(name: str, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the one batch for a network."""
    _, shape = NETS[name]
    rows = ROWS.get(name, 8)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(rows) % CLASSES
    share = rows // ranks
    mine = slice(rank * share, (rank + 1) * share)
    return x[mine], labels[mine]


def gradient(flow: Flow, called: nn.Module, x: Tensor, c: Tensor | None) -> tuple[float, Tensor]:
    """The loss of the last step here, and its gradient, all parameters in one vector."""
    loss = torch.zeros(())
    for _ in range(STEPS):
        flow.zero_grad()
        loss = called(x, c)
        loss.backward()
    grads: list[Tensor] = []
    for p in flow.parameters():
        assert p.grad is not None
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        grads.append(grad.flatten())
    return loss.item(), torch.cat(grads)


def compare(name: str, of_net: str, of_flow: str, rank: int) -> Gradient:
    """One network in these wrappers."""
    build, _ = NETS[name]
    objective = OBJECTIVES.get(name, "dumo")
    torch.manual_seed(0)
    net = build()
    classes = 0 if name == "encoder" else CLASSES
    alone = dumo.Flow(copy.deepcopy(net), objective, classes=classes, shard=(0, 1))
    x, labels = data(name, 0, 1)
    # The check is of all ranks, so this one is made on both.
    _, expected = gradient(alone, alone, x, labels if classes else None)

    flow = dumo.Flow(OF_NET[of_net](net), objective, classes=classes)
    called = OF_FLOW[of_flow](flow)
    x, labels = data(name, rank, 2)
    loss, found = gradient(flow, called, x, labels if classes else None)
    if of_flow == "plain" and of_net in ("plain", "compiled"):  # nobody takes the mean
        torch.distributed.all_reduce(found)
        found = found / 2
    torch._dynamo.reset()
    error = (found - expected).norm() / expected.norm()
    return Gradient(f"{name}, {of_net}, {of_flow}", error.item(), loss, flow.slope_report)


class AsksForTensors(nn.Module):
    """Of its input on rank 1, which no Dual is."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.net = Perceptron(Needs(heads=("v", "u")))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        if self.asks:
            assert isinstance(x, Tensor)
        return self.net(x, t)


def refusals(rank: int) -> dict[str, str]:
    """What a network of which rank 1 admits no dual numbers says here, and one of 16 bits."""
    x, labels = data("perceptron", rank, 2)
    asks = rank == 1
    said: dict[str, str] = {}

    def attempt(name: str, flow: Flow, x: Tensor, c: Tensor | None = None) -> None:
        try:
            flow(x, c)
            said[name] = f"none: {flow.slope_report}"
        except UserError as error:
            said[name] = str(error)

    attempt("slope", dumo.Flow(AsksForTensors(asks=asks)), x)
    given = dumo.Flow(AsksForTensors(asks=asks), {"kind": "dumo", "slope": {"kind": "dual"}})
    attempt("given slope", given, x)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    in_half = fully_shard(NETS["two times"][0](), mp_policy=policy)
    attempt("in half", dumo.Flow(in_half, "rcgm", classes=CLASSES), x, labels)
    return said


def main(rank: str, file: str, what: str) -> None:
    """Compare all cases of `what`, or ask for the refusals."""
    torch.set_num_threads(1)
    with meeting(file, int(rank)):
        if what == "refusals":
            print(json.dumps(refusals(int(rank))))
            return
        for case in CASES[what]:
            print(json.dumps(asdict(compare(*case, int(rank)))))
