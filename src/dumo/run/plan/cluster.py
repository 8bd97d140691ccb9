"""What a run takes on many ranks, counted without them: one rank's step, on tensors without numbers, in a group of
ranks that are not there and to whom nothing is sent.

The net is laid out as training lays it (`dumo.training.layout`), so gathers, gradients and what stays gathered come as
they do there. Memory is followed by torch's `FSDPMemTracker`, through a step that is not the first, when the optimizer
has its memory. What a driver, a library for sending and an allocator's gaps take comes on top.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dumo.flow.precision import autocast
from dumo.flow.slope import DualSlope, Way
from dumo.run.config.check import check_pieces
from dumo.run.config.spec import Run
from dumo.run.plan import cost, plan
from dumo.runtime import dist
from dumo.training import layout
from dumo.training.frozen import frozen_weights
from dumo.training.layout import share_of
from dumo.training.state import State, begin
from dumo.training.step import pieces, reference
from dumo.types import Frozen, Net, Noised, Terms

HOUR = 3600.0
USUAL = 0.4  # of a GPU's peak, where nobody says what it makes: ours
KINDS = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",  # of a tensor that lies in parts, by an optimizer
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}
PARTS = {  # ours, by what the tracker calls them
    "weights": ("Sharded Param", "Buffer"),
    "gathered": ("Unsharded Param", "All Gather"),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"),
    "optimizer": ("OptState",),
    "averages": ("Inputs",),
    "activations": ("Activation", "Temp"),
}


@dataclass(frozen=True)
class Step:
    """A rank's step: bytes at the moment when they are most, by what they are; what it sends, by the kind of call."""

    rows: int  # of the largest pass
    passes: int
    memory: dict[str, int]
    calls: dict[str, int]
    sent: dict[str, int]  # bytes of the whole that is gathered, scattered or averaged


def cluster(spec: Run, ranks: int, tflops: float | None = None) -> dict[str, Any]:
    """What a run takes on so many ranks: bytes of each, what they send in a step, of a checkpoint; work, and hours.

    `tflops`: what a GPU really makes, 10^12 operations a second; None: hours are not known. Raises UserError where the
    run does not fit so many ranks.
    """
    check_pieces(spec, ranks)
    step, held, train = counted(spec, ranks), plan.held(spec), spec.train
    fixed = plan.size(frozen_weights(spec.outline()).values())  # which no checkpoint holds
    whole = held["weights"] - fixed + held["optimizer"] + held["averages"]
    share = share_of(train.share, ranks)
    units = units_of(spec, given_back=train.reshard and share > 1)
    flops = units * cost.forward_flops(spec.outline(), spec.objective, spec.data.shape) * train.steps * train.batch
    return {
        "ranks": ranks,
        "share": share,
        "reshard": train.reshard,
        "checkpointing": getattr(spec.net, "checkpoint", False),
        "rows": step.rows,
        "passes": step.passes,
        "memory": {**step.memory, "peak": sum(step.memory.values())},
        "sent": {name: {"calls": step.calls[name], "bytes": size} for name, size in step.sent.items()},
        "checkpoint": {"bytes": whole, "most": (train.keep + 1) * whole},
        "units": units,
        "flops": flops,
        "tflops": tflops,
        "hours": tflops and flops / (ranks * tflops * 1e12) / HOUR,
    }


def counted(spec: Run, ranks: int) -> Step:
    """One rank's step, where its passes have as many rows as any; of one rank alone, at most (`plan.memory`)."""
    if ranks == 1:
        rows = plan.most_rows(spec, 1)
        memory = {"gathered": 0, **plan.memory(spec, rows)}
        return Step(rows, len(pieces(spec.train, spec.objective)), {name: memory[name] for name in PARTS}, {}, {})
    with pretended(ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 'dual' says what `units_of` counts
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        net = spec.outline()
        with fake:
            net.to_empty(device="cpu")
        state = begin(net, spec.train)
        with fake:
            return tracked(spec, state)


@contextmanager
def pretended(ranks: int) -> Generator[None, None, None]:
    """A group of so many ranks, of which this process is the first and the only one. Raises UserError within a real."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.alone("a plan for ranks")
    dist.require_ranks("a plan for ranks")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def tracked(spec: Run, state: State) -> Step:
    """A step of the first rank, after another: passes and update.

    Two passes stand for all: one between the first and the last gathers what the last does, and sends no gradients.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    train, cuts = spec.train, pieces(spec.train, spec.objective)
    rows, passes = plan.most_rows(spec), min(len(cuts), 2)
    for p in state.net.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    update(state)  # torch works out once how to move sharded weights, on whole ones: not to be counted
    state.optimizer.zero_grad()
    loss = Loss(spec, state.net, reference(state, train.ref), rows)
    tracker, sent, moved = FSDPMemTracker(state.net, state.optimizer), [Sent() for _ in range(passes)], Sent()
    tracker.track_inputs(tuple(plan.averaged(state)))
    with tracker:
        for one in sent:
            layout.finish(state.net, one is sent[-1], reshard=train.reshard)
            with one:
                loss().backward()
        with moved:
            update(state)
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    found = {getattr(kind, "value", ""): size for kind, size in snapshot.items()}
    memory = {part: sum(found[kind] for kind in kinds) for part, kinds in PARTS.items()}
    every = [*sent, moved]
    calls, size = (sum(counts, Counter[str]()) for counts in ([x.calls for x in every], [x.bytes for x in every]))
    calls["all-gather"] += (len(cuts) - passes) * sent[-1].calls["all-gather"]
    size["all-gather"] += (len(cuts) - passes) * sent[-1].bytes["all-gather"]
    return Step(rows, len(cuts), memory, +calls, +size)


def update(state: State) -> None:
    """Move weights and averages by the gradients that are there."""
    state.optimizer.step()
    for average in state.averages.values():
        average.update(state.net, 1)


class Loss(nn.Module):
    """The passes of a step, in a module of their own: the tracker takes a net that is called once, or from another."""

    def __init__(self, spec: Run, net: nn.Module, ref: Frozen, rows: int) -> None:
        """Of so many rows."""
        super().__init__()
        self.batch = cost.blank(spec.objective, spec.path, rows, spec.data.shape)
        self.autocast = partial(autocast, spec.train.precision, "cpu", keep=not layout.gives_back(spec.train.reshard))
        self.work: Callable[[Noised], Terms] = partial(spec.objective.loss, net, ref)  # no part of this one's

    def forward(self) -> Tensor:
        """The loss, whose gradient is that of all passes."""
        with self.autocast():
            return self.work(self.batch).loss.sum()


class Sent(TorchDispatchMode):
    """Counts what a layout asks of its group: calls, and bytes of the larger side, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation."""
        space, name, *_ = str(func).split(".")
        found = func(*args, **kwargs or {})
        if space == "c10d" or name in KINDS:
            self.calls[KINDS[name]] += 1
            self.bytes[KINDS[name]] += max(x.nbytes for x in tree_leaves((args, found)) if isinstance(x, Tensor))
        return found


class Untaped(DualSlope):
    """A dual slope that finds the weights given back when its tape is to be played, and makes a pass of its own."""

    def way(self, net: Net, ref: Frozen, *, known: bool) -> Way:
        """A pass instead of the tape."""
        way = super().way(net, ref, known=known)
        return Way("pass", "the weights are given back after the pass") if way.name == "tape" else way


def units_of(spec: Run, *, given_back: bool) -> float:
    """Forward units of a step (`cost.forward_units`), where weights may be `given_back` after each pass."""
    objective = spec.objective
    if given_back and isinstance(objective.needs.slope, DualSlope):
        objective = objective.model_copy(update={"slope": Untaped()})
    return cost.forward_units(spec.outline(), objective, spec.path, spec.data.shape, ref=spec.train.ref)
