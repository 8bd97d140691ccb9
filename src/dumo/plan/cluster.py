"""What a run takes on many ranks, counted without them, and the first layout that keeps within a memory.

- `cluster` has the facts of a run on some ranks: bytes, traffic, work, hours. It calls `count_step`.
- `count_step` counts one rank's step.
- `fit` tries layouts (`_layout_fields`, `_LayoutTrials`) until the peak of a step is small enough, and returns the
  fields to set; `with_fields` and `set_arguments` apply and write such fields.

One rank's step is made on tensors without values, in a group of ranks that do not exist (`fake_ranks`). So nothing is
sent, and what would be sent is counted (`Traffic`).

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

from dumo.config.change import override, yaml_text
from dumo.config.fit import check_ranks
from dumo.config.load import parse
from dumo.config.spec import Run
from dumo.flow.linearize import Moving
from dumo.flow.path import FlowPath
from dumo.flow.precision import Precision, autocast
from dumo.flow.slope import DualSlope, Way
from dumo.nets import Pretrained
from dumo.nets.adapter import Lora
from dumo.nets.textfamily import has_embeddings
from dumo.plan import plan
from dumo.plan.host import host_bytes
from dumo.run import cost, memory
from dumo.run.memory import HeldBytes
from dumo.run.net import outline
from dumo.runtime import dist
from dumo.runtime.progress import ignore_line
from dumo.runtime.text import SECONDS_PER_HOUR, bytes_text
from dumo.training import layout
from dumo.training.layout import share_of
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.training.step import flow_of, passes_of_rank
from dumo.types import Frozen, Net, Noised, Objective, Terms, UserError

USUAL_SHARE_OF_PEAK = 0.4  # of a GPU's peak that training reaches, where nothing else is known: ours
_MIN_ROWS = 8  # at a time: fewer leave a GPU idle, except in a pretrained net, whose rows have many tokens. Ours
CODINGS = ("float32", "bfloat16", "int8", "nf4")  # of `net.lora.frozen`, each with fewer bits than the one before
_COLLECTIVES = {  # kinds of collective calls, by the names of torch's operations
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",  # of a tensor that lies in parts, by an optimizer
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}
_MEMORY_PARTS = {  # of a step: the tracker's names for each
    "weights": ("Sharded Param", "Buffer"),
    "gathered": ("Unsharded Param", "All Gather"),
    "gradients": ("Sharded Grad", "Unsharded Grad", "Reduce Scatter"),
    "optimizer": ("OptState",),
    "averages": ("Inputs",),
    "activations": ("Activation", "Temp"),
}

Fields = dict[str, Any]  # dotted fields and their values


@dataclass(frozen=True)
class RankStep:
    """The memory and the traffic of one rank's step."""

    rows: int  # of the largest pass
    passes: int  # in a step
    memory: dict[str, int]  # bytes at the peak, by the names of _MEMORY_PARTS
    calls: dict[str, int]  # number of collective calls by kind: all-gather, reduce-scatter, all-reduce
    sent: dict[str, int]  # bytes by kind, of the whole tensor that is gathered, scattered or averaged


def cluster(spec: Run, ranks: int, tflops: float | None = None) -> dict[str, Any]:
    """The facts of a run on `ranks` ranks: bytes of each rank, what a step sends, checkpoints, host memory, work.

    `tflops` is what a GPU really makes, in 10^12 operations a second; without it `hours` are None. Raises UserError
    where the run cannot be divided among this many ranks.
    """
    train = spec.train
    objective = spec.objective
    path = spec.path
    shape = spec.data.shape
    check_ranks(train, objective, ranks)
    net = outline(spec)
    share = share_of(train.share, ranks)
    units = step_units(net, objective, path, shape, train.ref, frees_weights=train.reshard and share > 1)
    flops = units * cost.forward_flops(net, objective, shape) * train.steps * train.batch
    held = memory.held_bytes(net, train)
    step = count_step(outline(spec), objective, path, shape, train, ranks)
    parts = step.memory | plan.text_bytes(spec.net, spec.data.classes)
    peak = sum(parts.values())
    checkpoint = memory.checkpoint_bytes(net, held, ranks)
    bytes_by_device = host_bytes(
        net,
        train,
        ranks=ranks,
        held=held,
        checkpoint_copy=checkpoint.host_copy_per_rank,
        step=peak,
        has_slope=objective.needs.slope is not None,
    )
    hours = None
    if tflops:
        hours = flops / (ranks * tflops * 1e12) / SECONDS_PER_HOUR
    return {
        "ranks": ranks,
        "share": share,
        "reshard": train.reshard,
        "checkpointing": spec.net.checkpoint,
        "rows": step.rows,
        "passes": step.passes,
        "memory": {**parts, "peak": peak},
        "sent": {name: {"calls": step.calls[name], "bytes": size} for name, size in step.sent.items()},
        "checkpoint": {
            "bytes": checkpoint.on_disk,
            "copy": checkpoint.host_copy_per_rank,
            "most": (train.keep + 1) * checkpoint.on_disk,
        },
        "host": bytes_by_device,
        "units": units,
        "flops": flops,
        "tflops": tflops,
        "hours": hours,
    }


def count_step(
    net: nn.Module, objective: Objective, path: FlowPath, shape: tuple[int, ...], train: Train, ranks: int
) -> RankStep:
    """Count the step of the rank whose passes have the most rows; for one rank alone, an upper bound of it.

    `net` is an outline, and must not be used afterwards: its tensors are replaced.
    """
    if ranks == 1:
        rows = plan.most_rows(train, objective, 1)
        parts = {"gathered": 0, **memory.training_bytes(net, objective, path, shape, train, rows).parts}
        passes = len(passes_of_rank(train, objective))
        return RankStep(rows, passes, memory={name: parts[name] for name in _MEMORY_PARTS}, calls={}, sent={})
    with fake_ranks(ranks), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 'dual' says what `step_units` counts
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            net.to_empty(device="cpu")
        state = begin(net, train)
        with fake:
            batch = cost.empty_cpu_batch(objective, path, plan.most_rows(train, objective), shape)
            return _track_step(state, objective, path, batch, train)


@contextmanager
def fake_ranks(ranks: int) -> Generator[None, None, None]:
    """Inside, this process is the first of a group of `ranks` ranks; the others do not exist.

    Raises UserError where the process is in a group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.require_one_process("a plan for ranks")
    dist.require_distributed_torch("a plan for ranks")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _track_step(state: State, objective: Objective, path: FlowPath, batch: Noised, train: Train) -> RankStep:
    """Make the second step of the first rank, passes of this batch and the update, and count its memory and traffic.

    Two passes stand for all: one between the first and the last gathers as much as the last, and sends no gradients.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    num_passes = len(passes_of_rank(train, objective))
    num_tracked = min(num_passes, 2)
    for p in state.net.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    _update(state)  # torch works out once how to move sharded weights, on whole ones: not to be counted
    state.optimizer.zero_grad()
    reference = flow_of(state, train, objective, path, 0).reference
    loss = _TrackedLoss(state.net, reference, objective, batch, train)
    tracker = FSDPMemTracker(state.net, state.optimizer)
    tracker.track_inputs(tuple(memory.average_tensors(state)))
    pass_traffic = [Traffic() for _ in range(num_tracked)]
    update_traffic = Traffic()
    with tracker:
        for number, traffic in enumerate(pass_traffic, 1):
            layout.prepare_backward(state.net, number == num_tracked, reshard=train.reshard)
            with traffic:
                loss().backward()
        with update_traffic:
            _update(state)

    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    bytes_by_kind = {getattr(kind, "value", ""): size for kind, size in snapshot.items()}
    parts: dict[str, int] = {}
    for part, kinds in _MEMORY_PARTS.items():
        parts[part] = sum(bytes_by_kind[kind] for kind in kinds)

    calls = Counter[str]()
    sent = Counter[str]()
    for traffic in (*pass_traffic, update_traffic):
        calls.update(traffic.calls)
        sent.update(traffic.bytes)
    num_untracked = num_passes - num_tracked
    calls["all-gather"] += num_untracked * pass_traffic[-1].calls["all-gather"]
    sent["all-gather"] += num_untracked * pass_traffic[-1].bytes["all-gather"]
    return RankStep(len(batch.t), num_passes, memory=parts, calls=+calls, sent=+sent)  # without zeros


def _update(state: State) -> None:
    """Update weights and averages by the gradients, as a step of training does."""
    state.optimizer.step()
    for average in state.averages.values():
        average.update(state.net, 1)


class _TrackedLoss(nn.Module):
    """The loss of a pass as a module: the tracker takes a net that is called once, or from inside another module."""

    def __init__(self, net: nn.Module, ref: Frozen, objective: Objective, batch: Noised, train: Train) -> None:
        """`ref` is theta^-, `batch` the batch of one pass."""
        super().__init__()
        self.batch = batch
        self.autocast = partial(autocast, train.precision, "cpu", keep=not layout.frees_gathered_weights(train.reshard))
        # in a partial, so that the net is no submodule of this one
        self.loss: Callable[[Noised], Terms] = partial(objective.loss, net, ref)

    def forward(self) -> Tensor:
        """The sum of the loss over the batch, a number."""
        with self.autocast():
            return self.loss(self.batch).loss.sum()


class Traffic(TorchDispatchMode):
    """Counts the collective calls of a layout while it is entered: calls, and bytes of the larger side, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()
        self.bytes = Counter[str]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run an operation of torch, and count it if it is a collective call."""
        namespace, name, *_ = str(func).split(".")
        output = func(*args, **kwargs or {})
        if namespace == "c10d" or name in _COLLECTIVES:
            kind = _COLLECTIVES[name]
            self.calls[kind] += 1
            self.bytes[kind] += max(x.nbytes for x in tree_leaves((args, output)) if isinstance(x, Tensor))
        return output


class _ReshardedDualSlope(DualSlope):
    """A dual slope of weights that are freed after each pass: no tape can be replayed, so it makes another pass."""

    def way(self, net: Net, ref: Frozen, *, known: bool, moving: Moving | None = None) -> Way:
        """The way of a dual slope, with another pass in place of the tape."""
        way = super().way(net, ref, known=known, moving=moving)
        if way.name == "tape":
            return Way("pass", "the weights are given back after the pass")
        return way


def step_units(
    net: nn.Module,
    objective: Objective,
    path: FlowPath,
    shape: tuple[int, ...],
    ref: cost.Theta,
    *,
    frees_weights: bool,
) -> float:
    """Forward units of a step (`cost.forward_units`). `frees_weights`: sharded weights are freed after each pass."""
    if frees_weights and isinstance(objective.needs.slope, DualSlope):
        objective = objective.model_copy(update={"slope": _ReshardedDualSlope()})
    return cost.forward_units(net, objective, path, shape, ref=ref)


def fit(spec: Run, ranks: int, limit: int, tell: Callable[[str], object] = ignore_line) -> Fields:
    """The fields to set for the first layout whose peak on each rank is at most `limit` bytes.

    `tell` is called with a line on each layout that is tried. Raises UserError if none fits, or the run cannot be
    divided among this many ranks.
    """
    trials = _LayoutTrials(spec, ranks, limit, tell)
    try:
        with_fields(spec, {"net.checkpoint": True})  # raises where blocks would forget a mask
        can_checkpoint = spec.net.checkpoint is not True
    except UserError:
        can_checkpoint = False
    min_rows = 1 if isinstance(spec.net, Pretrained) else _MIN_ROWS
    all_layouts = list(_layout_fields(spec.train, ranks, can_checkpoint=can_checkpoint))
    for base_fields, layout_fields in product(_base_fields(spec.net.lora, spec.train.precision), all_layouts):
        fields = base_fields | layout_fields
        train = with_fields(spec, fields).train
        all_rows, *fewer_rows = [fields | rows for rows in _row_fields(train, spec.objective, ranks, min_rows)]
        if trials.fits(all_rows):
            return all_rows
        if fewer_rows and trials.fits(fewer_rows[-1]):  # else none of them fits
            return next(candidate for candidate in fewer_rows if trials.fits(candidate))
    ranks_text = "1 rank" if ranks == 1 else f"{ranks} ranks"
    untried = ", ".join(_untried_settings(spec))
    raise UserError(
        f"no layout keeps within {bytes_text(limit, 1024)} on each of {ranks_text}: the least is "
        f"{trials.least_peak_text()}. Take more ranks, larger GPUs, or a smaller net"
        + (f"; or set what is not tried: {untried}" if untried else "")
    )


def _untried_settings(spec: Run) -> Iterator[str]:
    """Yield what takes less memory, too, but changes what is trained, or its speed, so that a user is to choose it."""
    if spec.net.lora and spec.net.lora.rank > 1:
        yield f"net.lora.rank below {spec.net.lora.rank}"
    if spec.train.optimizer.kind != "adamw8bit":
        yield "train.optimizer.kind=adamw8bit"
    if spec.train.weights != "bfloat16":
        yield "train.weights=bfloat16 (with adamw8bit and train.precision=bf16)"
    if spec.train.ema:
        yield "train.ema=[]"
    if has_embeddings(spec.net.texts) and not spec.net.texts.is_mapped(spec.data.classes):
        yield "net.texts.memory=0 (captions stay on the host)"


class _LayoutTrials:
    """The layouts of a run that were tried, and the peak bytes of each on a rank."""

    def __init__(self, spec: Run, ranks: int, limit: int, tell: Callable[[str], object]) -> None:
        """`limit` is the most bytes that a rank may take; `tell` is called with a line on each layout."""
        self.spec = spec
        self.ranks = ranks
        self.limit = limit
        self.tell = tell
        self.peaks: dict[str, int] = {}  # bytes, by the name of the layout
        self.counted: set[str] = set()  # names of layouts whose whole step was counted; other peaks are lower bounds
        self.held_by_lora: dict[str, HeldBytes] = {}  # layouts differ in the bits of the base under a LoRA
        self.texts = sum(plan.text_bytes(spec.net, spec.data.classes).values())  # bytes, the same in all layouts

    def fits(self, fields: Fields) -> bool:
        """Whether the layout with these fields set keeps within the limit. A step is counted once, where it might."""
        name = " ".join(set_arguments(fields)) or "as it is"
        if name not in self.peaks:
            run = with_fields(self.spec, fields)
            lora = str(run.net.lora)
            if lora not in self.held_by_lora:
                self.held_by_lora[lora] = memory.held_bytes(outline(run), run.train)
            self.peaks[name] = _least_bytes(run.train, self.ranks, self.held_by_lora[lora]) + self.texts
            if self.peaks[name] <= self.limit:
                self.counted.add(name)
                step = count_step(outline(run), run.objective, run.path, run.data.shape, run.train, self.ranks)
                self.peaks[name] = sum(step.memory.values()) + self.texts
            self.tell(f"{name}: {self._peak_text(name)}")
        return self.peaks[name] <= self.limit

    def least_peak_text(self) -> str:
        """The smallest peak, of those that were counted if any was, and the layout that has it."""
        name = min(self.counted or self.peaks, key=lambda name: self.peaks[name])
        return f"{self._peak_text(name)}, {name}"

    def _peak_text(self, name: str) -> str:
        """The peak of a layout in words."""
        peak = bytes_text(self.peaks[name], 1024)
        return peak if name in self.counted else f"more than {peak}"


def _base_fields(lora: Lora | None, precision: Precision) -> Iterator[Fields]:
    """Yield the fields to set for the frozen base of a LoRA: none, and then codings of fewer and fewer bits."""
    yield {}
    if lora is None:
        return
    for coding in CODINGS[CODINGS.index(lora.frozen) + 1 :]:
        if coding != "bfloat16" or precision == "bf16":
            yield {"net.lora.frozen": coding}


def _least_bytes(train: Train, ranks: int, held: HeldBytes) -> int:
    """The bytes that a rank holds at the end of a forward pass, without activations. They are known without a pass."""
    between_steps = held.weights + held.optimizer + held.averages
    gathered_weights = held.weights if ranks > 1 and not train.reshard else 0
    return between_steps // share_of(train.share, ranks) + gathered_weights


def _layout_fields(train: Train, ranks: int, *, can_checkpoint: bool) -> Iterator[Fields]:
    """Yield the fields to set for each layout, without rows at a time: none, and then those that take less memory.

    `can_checkpoint`: blocks could be computed again in the backward pass, and not all of them are yet.
    """
    share = share_of(train.share, ranks)
    shardings = [(shards, train.reshard) for shards in range(share, ranks + 1) if ranks % shards == 0]
    if ranks > 1 and not train.reshard:
        shardings.append((ranks, True))
    checkpointing = (False, True) if can_checkpoint else (False,)
    for (shards, reshard), checkpoint in product(shardings, checkpointing):
        fields: Fields = {}
        if checkpoint:
            fields["net.checkpoint"] = True
        if shards != share:
            fields["train.share"] = shards
        if reshard != train.reshard:
            fields["train.reshard"] = reshard
        yield fields


def _row_fields(train: Train, objective: Objective, ranks: int, min_rows: int) -> Iterator[Fields]:
    """Yield the fields to set for rows at a time: none, then half as many down to `min_rows`.

    It ends before a number by which the batch cannot be cut.
    """
    yield {}
    rows = plan.most_rows(train, objective, ranks) // 2
    while rows >= min_rows:
        try:
            check_ranks(train.model_copy(update={"micro_batch": rows}), objective, ranks)
        except UserError:  # groups or kinds of rows would be separated
            return
        yield {"train.micro_batch": rows}
        rows //= 2


def with_fields(spec: Run, fields: Fields) -> Run:
    """The run with these fields set. Raises UserError where they do not fit it."""
    tree = spec.model_dump(mode="json")
    override(tree, set_arguments(fields))
    return parse(Run, tree)


def set_arguments(fields: Fields) -> list[str]:
    """The fields as arguments of `--set`: name=value."""
    return [f"{name}={yaml_text(value)}" for name, value in fields.items()]
