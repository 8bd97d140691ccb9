"""What a run takes on many ranks, counted without them, and the first layout that keeps within a memory.

One rank's step is made on tensors without numbers, in a group of ranks that are not there, so that nothing is sent.

The net is laid out as training lays it (`dumo.training.layout`), so gathers, gradients and what stays gathered come as
they do there. Memory is followed by torch's `FSDPMemTracker`, through a step that is not the first, when the optimizer
has its memory. What a driver, a library for sending and an allocator's gaps take comes on top.

Layouts are tried that leave what a run learns as it is, in this order: fewer rows at a time, blocks computed again in
the backward pass (`net.checkpoint`), weights shared by more ranks, weights given back after each pass. Where none fits,
all are tried again on a base under LoRA that is kept in fewer bits (`net.lora.frozen`).
"""

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dumo.config.change import override, shown
from dumo.config.check import check_pieces
from dumo.config.load import parse
from dumo.config.spec import Run
from dumo.flow.path import Path
from dumo.flow.precision import Precision, autocast
from dumo.flow.slope import DualSlope, Way
from dumo.nets import Pretrained
from dumo.nets.adapter import Lora
from dumo.plan import plan
from dumo.plan.host import DEVICES, host
from dumo.run import cost, memory
from dumo.run.memory import HeldBytes
from dumo.run.net import outline
from dumo.runtime import dist
from dumo.runtime.progress import sized
from dumo.training import layout
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.training.step import flow_of, pieces
from dumo.types import Frozen, Net, Noised, Objective, Terms, UserError

HOUR = 3600.0
USUAL = 0.4  # of a GPU's peak, if it is not given: ours
FEWEST = 8  # rows at a time: fewer leave a GPU idle, but of a pretrained net, a row of which has many tokens. Ours
CODINGS = ("float32", "bfloat16", "int8", "nf4")  # of `net.lora.frozen`, each with fewer bits than the one before
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


Fields = dict[str, Any]  # dotted fields and their values


@dataclass(frozen=True)
class Step:
    """A rank's step: bytes at the moment when they are most, by what they are; what it sends, by the kind of call."""

    rows: int  # of the largest pass
    passes: int
    memory: dict[str, int]
    calls: dict[str, int]
    sent: dict[str, int]  # bytes of the whole that is gathered, scattered or averaged


def cluster(spec: Run, ranks: int, tflops: float | None = None) -> dict[str, Any]:
    """What a run takes on `ranks` ranks: bytes of each, what they send in a step, of a checkpoint; work, and hours.

    `tflops`: what a GPU really makes, 10^12 operations a second; None: hours are not known. Raises UserError where the
    run does not fit this many ranks.
    """
    train, objective, path, shape = spec.train, spec.objective, spec.path, spec.data.shape
    check_pieces(train, objective, ranks)
    net = outline(spec)
    share = share_of(train.share, ranks)
    units = units_of(net, objective, path, shape, train.ref, given_back=train.reshard and share > 1)
    flops = units * cost.forward_flops(net, objective, shape) * train.steps * train.batch
    held = memory.held(net, train)
    step = counted(outline(spec), objective, path, shape, train, ranks)
    parts = {**step.memory, "encoders": plan.of_encoders(spec.net, spec.data.classes)}
    peak = sum(parts.values())
    checkpoint = memory.checkpoint(net, held, ranks)
    return {
        "ranks": ranks,
        "share": share,
        "reshard": train.reshard,
        "checkpointing": spec.net.checkpoint,
        "rows": step.rows,
        "passes": step.passes,
        "memory": {**parts, "peak": peak},
        "sent": {name: {"calls": step.calls[name], "bytes": size} for name, size in step.sent.items()},
        "checkpoint": {**checkpoint._asdict(), "most": (train.keep + 1) * checkpoint.bytes},
        "host": {name: host(net, train, ranks, held, checkpoint.copy, peak, name) for name in DEVICES},
        "units": units,
        "flops": flops,
        "tflops": tflops,
        "hours": tflops and flops / (ranks * tflops * 1e12) / HOUR,
    }


def counted(net: nn.Module, objective: Objective, path: Path, shape: tuple[int, ...], train: Train, ranks: int) -> Step:
    """One rank's step, where its passes have as many rows as any; of one rank alone, at most (`memory.training`).

    `net` is an outline, which is used up.
    """
    if ranks == 1:
        rows = plan.most_rows(train, objective, 1)
        parts = {"gathered": 0, **memory.training(net, objective, path, shape, train, rows).parts}
        return Step(rows, len(pieces(train, objective)), {name: parts[name] for name in PARTS}, {}, {})
    with pretended(ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 'dual' says what `units_of` counts
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            net.to_empty(device="cpu")
        state = begin(net, train)
        with fake:
            batch = cost.blank(objective, path, plan.most_rows(train, objective), shape)
            return tracked(state, objective, path, batch, train)


@contextmanager
def pretended(ranks: int) -> Generator[None, None, None]:
    """A group of `ranks` ranks, of which only this process, the first, exists. Raises UserError inside a real one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.require_one_process("a plan for ranks")
    dist.require_ranks("a plan for ranks")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def tracked(state: State, objective: Objective, path: Path, batch: Noised, train: Train) -> Step:
    """A step of the first rank, after another: passes of this batch, and the update.

    Two passes stand for all: one between the first and the last gathers what the last does, and sends no gradients.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    cuts = pieces(train, objective)
    passes = min(len(cuts), 2)
    for p in state.net.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    update(state)  # torch works out once how to move sharded weights, on whole ones: not to be counted
    state.optimizer.zero_grad()
    reference = flow_of(state, train, objective, path, 0).reference
    loss = Loss(state.net, reference, objective, batch, train)
    tracker, sent, moved = FSDPMemTracker(state.net, state.optimizer), [Sent() for _ in range(passes)], Sent()
    tracker.track_inputs(tuple(memory.averages(state)))
    with tracker:
        for one in sent:
            layout.prepare_backward(state.net, one is sent[-1], reshard=train.reshard)
            with one:
                loss().backward()
        with moved:
            update(state)
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    found = {getattr(kind, "value", ""): size for kind, size in snapshot.items()}
    parts = {part: sum(found[kind] for kind in kinds) for part, kinds in PARTS.items()}
    every = [*sent, moved]
    calls, size = (sum(counts, Counter[str]()) for counts in ([x.calls for x in every], [x.bytes for x in every]))
    calls["all-gather"] += (len(cuts) - passes) * sent[-1].calls["all-gather"]
    size["all-gather"] += (len(cuts) - passes) * sent[-1].bytes["all-gather"]
    return Step(len(batch.t), len(cuts), parts, +calls, +size)


def update(state: State) -> None:
    """Move weights and averages by the gradients that are there."""
    state.optimizer.step()
    for average in state.averages.values():
        average.update(state.net, 1)


class Loss(nn.Module):
    """The passes of a step, in a module of their own: the tracker takes a net that is called once, or from another."""

    def __init__(self, net: nn.Module, ref: Frozen, objective: Objective, batch: Noised, train: Train) -> None:
        """Of this batch."""
        super().__init__()
        self.batch = batch
        self.autocast = partial(autocast, train.precision, "cpu", keep=not layout.frees_gathered_weights(train.reshard))
        self.work: Callable[[Noised], Terms] = partial(objective.loss, net, ref)  # no part of this one's

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


def units_of(
    net: nn.Module,
    objective: Objective,
    path: Path,
    shape: tuple[int, ...],
    ref: cost.Theta,
    *,
    given_back: bool,
) -> float:
    """Forward units of a step (`cost.forward_units`), where weights may be `given_back` after each pass."""
    slope = objective.needs.slope
    untaped = given_back and isinstance(slope, DualSlope)
    found = objective.model_copy(update={"slope": Untaped()}) if untaped else objective
    return cost.forward_units(net, found, path, shape, ref=ref)


def fit(spec: Run, ranks: int, limit: int, tell: Callable[[str], object] = lambda line: None) -> Fields:
    """The fields to set, of the first layout with a peak on each rank of at most `limit` bytes.

    `tell` hears of each layout that is tried. Raises UserError if none fits, or the run does not fit this many ranks.
    """
    held = dict[str, HeldBytes]()  # by the coding of the base
    tried = dict[str, int]()
    exact = set[str]()
    encoders = plan.of_encoders(spec.net, spec.data.classes)

    def fits(fields: Fields) -> bool:
        name, run = " ".join(words(fields)) or "as it is", changed(spec, fields)
        if name not in tried:
            base = str(run.net.lora)
            if base not in held:
                held[base] = memory.held(outline(run), run.train)
            tried[name] = at_least(run.train, ranks, held[base]) + encoders
            if tried[name] <= limit:
                exact.add(name)
                step = counted(outline(run), run.objective, run.path, run.data.shape, run.train, ranks)
                tried[name] = sum(step.memory.values()) + encoders
            tell(f"{name}: {'' if name in exact else 'more than '}{sized(tried[name], 1024)}")
        return tried[name] <= limit

    try:
        optional = spec.net.checkpoint is False and bool(changed(spec, {"net.checkpoint": True}))
    except UserError:  # blocks would forget a mask
        optional = False
    ways, fewest = [*layouts(spec.train, ranks, optional=optional)], 1 if isinstance(spec.net, Pretrained) else FEWEST
    for base, one in product(bases(spec.net.lora, spec.train.precision), ways):
        one = base | one
        first, *others = (one | rows for rows in halved(changed(spec, one).train, spec.objective, ranks, fewest))
        if fits(first):
            return first
        if others and fits(others[-1]):  # else none does
            return next(fields for fields in others if fits(fields))
    name = min(exact or tried, key=lambda name: tried[name])
    least = f"{'' if exact else 'more than '}{sized(tried[name], 1024)}, {name}"
    raise UserError(
        f"no layout keeps within {sized(limit, 1024)} on each of {ranks} rank{'s' if ranks > 1 else ''}: the least is "
        f"{least}. Take more ranks, larger GPUs, or a smaller net"
    )


def bases(lora: Lora | None, precision: Precision) -> Iterator[Fields]:
    """The fields to set for the frozen base of a LoRA: none, and then those of fewer bits."""
    yield {}
    after = CODINGS[CODINGS.index(lora.frozen) + 1 :] if lora else ()
    yield from ({"net.lora.frozen": one} for one in after if one != "bfloat16" or precision == "bf16")


def at_least(train: Train, ranks: int, held: HeldBytes) -> int:
    """Bytes that a rank holds at the end of a forward pass, activations left out: known without one."""
    stays = held.weights + held.optimizer + held.averages
    gathered = held.weights if ranks > 1 and not train.reshard else 0
    return stays // share_of(train.share, ranks) + gathered


def layouts(train: Train, ranks: int, *, optional: bool) -> Iterator[Fields]:
    """The fields to set, without rows at a time; first none, and then what takes less memory.

    `optional`: blocks could be computed again, and are not.
    """
    share = share_of(train.share, ranks)
    lie = [(n, train.reshard) for n in range(share, ranks + 1) if ranks % n == 0]
    lie += [(ranks, True)] if ranks > 1 and not train.reshard else []
    for (n, reshard), again in product(lie, (False, True) if optional else (False,)):
        fields = {"net.checkpoint": True} if again else {}
        fields |= {"train.share": n} if n != share else {}
        yield fields | ({"train.reshard": reshard} if reshard != train.reshard else {})


def halved(train: Train, objective: Objective, ranks: int, fewest: int = FEWEST) -> Iterator[Fields]:
    """Rows at a time: as many as now, then half of them down to the `fewest`, where the batch can be cut so."""
    yield {}
    rows = plan.most_rows(train, objective, ranks) // 2
    while rows >= fewest:
        try:
            check_pieces(train.model_copy(update={"micro_batch": rows}), objective, ranks)
        except UserError:  # groups of rows, or kinds of them, would be parted
            return
        yield {"train.micro_batch": rows}
        rows //= 2


def changed(spec: Run, fields: Fields) -> Run:
    """The run with these fields set."""
    tree = spec.model_dump(mode="json")
    override(tree, words(fields))
    return parse(Run, tree)


def words(fields: Fields) -> list[str]:
    """The fields as `--set` takes them."""
    return [f"{name}={shown(value)}" for name, value in fields.items()]
