"""The floating-point operations of a training step, counted from shapes.

    forward_flops    of a forward pass, per row
    step_cost        of a training step, per row: operations, forward units, and how a dual slope is computed
    forward_units    the units alone
    teacher_passes   how often a step asks a teacher for a row's velocity, which the others do not count
    exact_rows       the rows of the smallest batch that can be counted exactly
    count_flops      of any work
    count_by_depth   any count of a network, by its first few blocks

`dumo.run.memory` and `dumo.plan.cluster` count the bytes of the same steps.

The unit is F, a forward pass; a backward pass is 2 F. Counts depend on shapes alone, so operations are counted on the
meta device, without memory or arithmetic. Equal blocks cost the same, so a count is affine in the number of blocks of
each run of equal blocks (`Stretch`), and the first few blocks give the count of all.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import groupby
from math import lcm, prod
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dumo.flow import dropout
from dumo.flow.guide import Guide
from dumo.flow.linearize import Moving
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.path import FlowPath
from dumo.flow.slope import DualSlope, DualStrategy
from dumo.flow.trainable import require_loss_per_row
from dumo.nets.dualized import Dualized
from dumo.nets.heads import with_submodules
from dumo.runtime.random import stream
from dumo.training.frozen import copy_net
from dumo.types import Cond, Frozen, Heads, Net, NoisyBatch, Objective, Sample, TeacherVelocity, Time, frozen
from dumo.types.outside import name_of

_NO_GUIDANCE = Guide()
# Draws of times by which the share of rows inside the interval of guidance is measured.
TIMES = 1_000_000
# A network with more blocks is counted by a few of them.
MAX_BLOCKS_RUN = 6
# theta^-: the network itself, or an average of its weights, as `Train.ref`.
Theta = Literal["self"] | float
M = TypeVar("M", bound=nn.Module)


def forward_flops(net: nn.Module, objective: Objective, shape: Sequence[int]) -> float:
    """Floating-point operations of one pass forward, per row of this shape (two per multiply-add)."""
    rows = 2

    def count(net: nn.Module) -> int:
        return count_flops(lambda: _forward_pass(net, objective, shape, rows))

    return count_by_depth(net, count) / rows


def forward_units(
    net: nn.Module,
    objective: Objective,
    path: FlowPath,
    shape: Sequence[int],
    *,
    rows: int | None = None,
    ref: Theta = "self",
) -> float:
    """The forward units of a training step. Takes and raises as `step_cost`, which counts them."""
    return step_cost(net, objective, path, shape, rows=rows, ref=ref).units


class StepCost(NamedTuple):
    """What a training step costs per row, an image or a point."""

    units: float  # floating-point operations over those of a forward pass
    flops: float  # floating-point operations
    pass_flops: float  # those of a forward pass
    # How a dual slope computes du/dt in the first phase of the training; None without a dual slope.
    strategy: DualStrategy | None = None


def step_cost(
    net: nn.Module,
    objective: Objective,
    path: FlowPath,
    shape: Sequence[int],
    *,
    rows: int | None = None,
    ref: Theta = "self",
) -> StepCost:
    """Count a training step of `rows` rows of this shape: forward pass, targets and backward pass.

    `rows` None takes the smallest batch that can be counted exactly. The passes of guidance count by the expected share
    of the rows that need them. If the phases of a training cost differently (`Needs.phases`), the counts are means.
    Raises UserError if the loss is not one number per row.
    """
    pass_flops = forward_flops(net, objective, shape)
    counter = _StepCounter(
        net=net, path=path, shape=shape, rows=rows or exact_rows(objective), ref=ref, pass_flops=pass_flops
    )
    guide = objective.needs.guide
    if isinstance(guide, Guide) and guide.active:
        unguided, _ = counter.mean_units(objective.model_copy(update={"guide": _NO_GUIDANCE}))
        guided, strategy = counter.mean_units(objective)
        guided_share = _guided_share(objective, guide)
        units = unguided + guided_share * (guided - unguided)
    else:
        units, strategy = counter.mean_units(objective)
    return StepCost(units, units * pass_flops, pass_flops, strategy)


def _guided_share(objective: Objective, guide: Guide) -> float:
    """The expected share of the rows that need the passes of guidance: label kept, and time in the interval."""
    t, _ = objective.times(TIMES, stream("cost"))
    return (1 - objective.drop) * guide.inside(t).double().mean().item()


@dataclass(frozen=True)
class _StepCounter:
    """Counts the forward units of training steps of a net."""

    net: nn.Module
    path: FlowPath
    shape: Sequence[int]  # of a row
    rows: int  # of a step
    ref: Theta
    pass_flops: float  # floating-point operations of one pass forward, for a row

    def mean_units(self, objective: Objective) -> tuple[float, DualStrategy | None]:
        """Return the mean units of a step over the phases of the training, and the dual strategy in the first phase."""
        mean = 0.0
        strategy_by_phase: list[DualStrategy | None] = []
        for b, share in phases(objective, self.path, self.rows, self.shape):
            units, strategy = self._units_and_strategy(objective, b)
            mean += share * units
            strategy_by_phase.append(strategy)
        return mean, strategy_by_phase[0]

    def _units_and_strategy(self, objective: Objective, b: NoisyBatch) -> tuple[float, DualStrategy | None]:
        """Return the units of a step on a batch, and the strategy of its dual slope, or None without one."""
        slope = objective.needs.slope
        if not isinstance(slope, DualSlope):
            return self._units(objective, b), None
        noted_slope = _NotedSlope(slope=slope)
        units = self._units(objective.model_copy(update={"slope": noted_slope}), b)
        last_strategy = noted_slope.strategies[-1] if noted_slope.strategies else None
        return units, last_strategy

    def _units(self, objective: Objective, b: NoisyBatch) -> float:
        """The units of a step on a batch."""

        def count(net: nn.Module) -> int:
            meta_net, theta = meta_copies(net, self.ref)
            return count_flops(step_function(meta_net, theta, objective, b))

        return count_by_depth(self.net, count) / (self.rows * self.pass_flops)


def teacher_passes(net: nn.Module, objective: Objective, path: FlowPath, shape: Sequence[int]) -> float:
    """How often a training step asks a teacher for the velocity of a row, as a mean over the parts of the training."""
    rows = exact_rows(objective)
    passes = 0.0
    for progress, share in objective.needs.phases:
        teacher = _CountingTeacher()
        b = replace(_draw_on_meta(objective, path, rows, shape, teacher), progress=progress)
        step_function(*meta_copies(net, "self"), objective, b)()
        passes += share * teacher.rows / rows
    return passes


class _CountingTeacher:
    """A teacher that returns v_t, and counts the rows that it is asked for."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x_t: Sample, t: Time, c: Cond, v_t: Sample) -> Sample:
        self.rows += len(t)
        return v_t


class _NotedSlope(DualSlope):
    """A dual slope that uses the strategies of another, `slope`, and records them."""

    slope: DualSlope
    strategies: list[DualStrategy] = Field(default_factory=list[DualStrategy])

    def strategy(self, net: Net, ref: Frozen, *, known: bool, moving: Moving | None = None) -> DualStrategy:
        """Return the strategy of `slope`, and append it to `strategies`."""
        self.strategies.append(self.slope.strategy(net, ref, known=known, moving=moving))
        return self.strategies[-1]


def exact_rows(objective: Objective) -> int:
    """The fewest rows, at least 2, of which every share that an objective treats apart is a whole number."""
    times = objective.times
    moving = Fraction(times.moving_share).limit_denominator(1000)
    return lcm(2, times.group, moving.denominator, objective.needs.group)


@torch.no_grad()
def _forward_pass(net: nn.Module, objective: Objective, shape: Sequence[int], rows: int) -> Heads:
    """One pass on the meta device over `rows` rows."""
    x, c = _meta_batch(rows, shape)
    inputs = {name: x.new_empty(rows) for name in objective.needs.names}
    with dropout.off():
        return copy.deepcopy(net).to("meta")(x, c, **inputs)


def step_function(net: nn.Module, ref: Frozen, objective: Objective, b: NoisyBatch) -> Callable[[], object]:
    """A function that makes one step on a batch: forward pass, targets and backward pass, without dropout.

    It raises UserError if the loss is not one number per row.
    """
    rows = len(b.t)

    def step() -> None:
        with without_dropout(net, b):
            terms = require_loss_per_row(objective.loss(net, ref, b), rows, name_of(type(objective)))
            terms.loss.sum().backward()

    return step


def without_dropout(net: nn.Module, b: NoisyBatch) -> AbstractContextManager[object]:
    """A context in which passes over a batch route tokens as in training, and drop nothing: masks cost little."""
    is_routed = any(getattr(part, "is_routed", False) for part in net.modules())
    keys = dropout.keys(0, 0, len(b.t)).to(b.t.device) if is_routed else None
    return dropout.using(keys, drops=False)


def meta_copies(net: nn.Module, ref: Theta) -> tuple[nn.Module, Frozen]:
    """Copies of the net and of theta^- on the meta device."""
    net = copy.deepcopy(net).to("meta")
    return net, frozen(net) if ref == "self" else Frozen(copy_net(net))


def _draw_on_meta(
    objective: Objective, path: FlowPath, rows: int, shape: Sequence[int], teacher: TeacherVelocity = path_velocity
) -> NoisyBatch:
    """A noised batch on the meta device. What depends on a row's place alone has its values."""
    x, c = _meta_batch(rows, shape)
    return draw(objective, path, x, c, c, seed=0, step=0, teacher=teacher)


def phases(objective: Objective, path: FlowPath, rows: int, shape: Sequence[int]) -> list[tuple[NoisyBatch, float]]:
    """A noised batch on the meta device for each part of the training, with the part's share of all steps.

    Within a part (`Needs.phases`) all steps cost alike.
    """
    b = _draw_on_meta(objective, path, rows, shape)
    return [(replace(b, progress=progress), share) for progress, share in objective.needs.phases]


def _meta_batch(rows: int, shape: Sequence[int]) -> tuple[Sample, Cond]:
    """Samples (rows, *shape) and labels (rows,) on the meta device."""
    return torch.empty(rows, *shape, device="meta"), torch.empty(rows, dtype=torch.long, device="meta")


def empty_cpu_batch_like(b: NoisyBatch) -> NoisyBatch:
    """A noised batch of the shapes of `b` on the CPU, its values undefined."""
    tensors: dict[str, Tensor] = {}
    for field in fields(b):
        value = getattr(b, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = torch.empty_like(value, device="cpu")
    drawn = {name: torch.empty_like(value, device="cpu") for name, value in b.drawn.items()}
    return replace(b, **tensors, drawn=drawn)


class Stretch(NamedTuple):
    """Blocks that are alike and run one after another, and the path of the list that they are in."""

    path: str
    blocks: list[nn.Module]
    level: int | None = None  # in a UNet: how often its input is halved before; None: of no other stretch


def count_by_depth(net: M, count: Callable[[M], int], *, check: bool = False) -> int:
    """Count something of a net by `count`: of all of it, or, where it is deep, by its first few blocks.

    A deep net is counted with one block of each stretch, and again with one more of it, and the rest is added in
    proportion. Stretches of a UNet on one level whose blocks are alike add the same for each block, so only one of
    these is counted again with one more. Most UNets are first counted without any block.

    `check`: start from two blocks per stretch, and also count with two more in every stretch. If that is not linear, or
    some stretch adds nothing, count the whole net. It is for counts, as of bytes, in which the ends of a net may
    outweigh a few blocks.
    """
    net_stretches = stretches(net)
    lengths = [len(stretch.blocks) for stretch in net_stretches]
    num_first = 2 if check else 1  # blocks of each stretch in the first count
    if is_unet(net) and _trains_time(net):
        num_first = 0  # all blocks cost alike: through the embedding of time even the first has gradients of its input
    if sum(lengths) <= MAX_BLOCKS_RUN or max(lengths) <= num_first:
        return count(net)

    first = [num_first] * len(lengths)  # blocks of each stretch; `cut` takes all of a stretch that has fewer
    first_count = count(cut(net, first))
    added_by_stretch = [0] * len(lengths)  # what one block more of each stretch adds
    added_by_kind: dict[object, int] = {}  # the same, by what stretches that add alike have in common
    for i, stretch in enumerate(net_stretches):
        if lengths[i] <= num_first:
            continue
        place = ("stretch", i) if stretch.level is None else ("level", stretch.level)
        kind = (place, _kind(stretch.blocks[0]))
        if kind not in added_by_kind:
            one_more = [*first]
            one_more[i] += 1
            added_by_kind[kind] = count(cut(net, one_more)) - first_count
        added_by_stretch[i] = added_by_kind[kind]
    pairs = list(zip(lengths, added_by_stretch, strict=True))
    if check:
        added_by_two = sum(min(n - num_first, 2) * added for n, added in pairs)
        all_add = all(added for n, added in pairs if n > num_first)
        two_more = [num_first + 2] * len(lengths)
        if not all_add or count(cut(net, two_more)) != first_count + added_by_two:
            return count(net)
    return first_count + sum((n - num_first) * added for n, added in pairs)


class SampledNet(NamedTuple):
    """A UNet with fewer blocks, in which one block of each kind stands for those that are left out."""

    net: nn.Module
    left_out: dict[str, int]  # path of a block: the number of blocks left out that are as it is


def sample_blocks(net: nn.Module) -> SampledNet:
    """A UNet with the first block of each stretch, and of each kind two more, in the last stretch of that kind.

    Blocks are of a kind if they are alike and on one level. The block of a kind that stands for those left out is
    between two others, so its input and its output are blocks', as theirs are. All parts are shared, and `net` is left
    as it is.
    """
    net_stretches = stretches(net)
    stretches_by_kind: dict[object, list[int]] = {}
    for i, stretch in enumerate(net_stretches):
        stretches_by_kind.setdefault((stretch.level, _kind(stretch.blocks[0])), []).append(i)

    blocks_of_stretch = [stretch.blocks[:1] for stretch in net_stretches]
    left_out_by_stretch: dict[int, int] = {}
    for numbers in stretches_by_kind.values():
        more_blocks: list[nn.Module] = []
        for i in numbers:
            more_blocks += net_stretches[i].blocks[1:]
        blocks_of_stretch[numbers[-1]] += more_blocks[:2]
        if len(more_blocks) > 2:
            left_out_by_stretch[numbers[-1]] = len(more_blocks) - 2

    lists: dict[str, list[nn.Module]] = {}
    left_out: dict[str, int] = {}
    for i, stretch in enumerate(net_stretches):
        blocks = lists.setdefault(stretch.path, [])
        if i in left_out_by_stretch:
            left_out[f"{stretch.path}.{len(blocks) + 1}"] = left_out_by_stretch[i]
        blocks += blocks_of_stretch[i]
    return SampledNet(with_submodules(net, {path: nn.ModuleList(lists[path]) for path in lists}), left_out)


def cut(net: M, lengths: Sequence[int]) -> M:
    """The net with this many first blocks of each stretch. All parts are shared, and the net is left as it is."""
    lists: dict[str, list[nn.Module]] = {}
    for stretch, n in zip(stretches(net), lengths, strict=True):
        lists.setdefault(stretch.path, []).extend(stretch.blocks[:n])
    return with_submodules(net, {path: nn.ModuleList(blocks) for path, blocks in lists.items()})


def stretches(net: nn.Module) -> list[Stretch]:
    """The stretches of a net: runs of alike blocks, of which some may be left out for a count.

    A pretrained net has stretches, and so has a net whose `blocks` are alike, but for the last and the routed ones.
    Those of a UNet are in its transformers: its own blocks are not in a row, since each also feeds one on the way up.
    """
    if is_unet(net):
        return _stretches_of_unet(net)
    lists: dict[str, nn.ModuleList] = {}
    if isinstance(net, Dualized):
        for name, part in net.model.named_children():
            if isinstance(part, nn.ModuleList):
                lists[f"model.{name}"] = part
    else:
        blocks = getattr(net, "blocks", None)
        if isinstance(blocks, nn.ModuleList):
            lists["blocks"] = blocks
            unrouted_kinds = {_unrouted_kind(block) for block in [*blocks][:-1]}
            if len(unrouted_kinds) > 1:
                return []
    stretches_in_order: list[Stretch] = []
    for path, part in lists.items():
        for _, alike in groupby(part, _kind):
            stretches_in_order.append(Stretch(path, [*alike]))
    return stretches_in_order


def is_unet(net: nn.Module) -> bool:
    """Whether a net is a UNet of diffusers."""
    return isinstance(net, Dualized) and net.is_unet


def _trains_time(unet: nn.Module) -> bool:
    """Whether a UNet's embedding of time is trained, so that all of its blocks have gradients of their inputs."""
    return any(p.requires_grad for p in unet.get_submodule("model.time_embedding").parameters())


def _stretches_of_unet(net: nn.Module) -> list[Stretch]:
    """The stretches in a UNet's transformers, in the order of their paths."""
    levels = len([*net.get_submodule("model.down_blocks").children()])
    stretches_in_order: list[Stretch] = []
    for path, part in net.named_modules():
        if isinstance(part, nn.ModuleList) and path.endswith(".transformer_blocks"):
            _, side, *number = path.split(".")[:3]
            if side == "down_blocks":
                level = int(number[0])
            elif side == "up_blocks":
                level = levels - 1 - int(number[0])
            else:  # the middle
                level = levels - 1
            for _, alike in groupby(part, _kind):
                stretches_in_order.append(Stretch(path, [*alike], level))
    return stretches_in_order


def _kind(block: nn.Module) -> tuple[object, ...]:
    """What blocks that cost alike have in common: whether they are routed, and `_unrouted_kind`."""
    is_routed = getattr(block, "is_routed", False)
    return is_routed, *_unrouted_kind(block)


def _unrouted_kind(block: nn.Module) -> tuple[object, ...]:
    """What blocks that cost alike, but for routing, have in common: class, shapes, whether they are computed again."""
    is_recomputed = getattr(block, "is_recomputed", False)
    shapes = ((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
    return type(block), is_recomputed, *shapes


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and convolutions that `work` makes, on any device."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes 0.2 s

    aten = torch.ops.aten
    # What torch's table lacks. That a fused backward pass computes the scores again is not counted.
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        aten.addmm_: _addmm_flops,
        aten.baddbmm_: _addmm_flops,
        # torch's own formula does not know of groups.
        aten.convolution_backward: _convolution_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


def _addmm_flops(_out: object, a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """Operations of a product a @ b that is added to a tensor in place. Takes shapes."""
    return 2 * prod(a) * b[-1]


def _convolution_backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    w: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    mask: Sequence[bool],
    **_: object,
) -> int:
    """Operations of a convolution's backward pass: its own for each gradient, of the input and of the weights.

    Takes shapes: w is (out, in / groups, ...). `mask` says which gradients are wanted: of input, weights and bias.
    """
    positions = x if transposed else grad
    num_gradients = sum(mask[:2])
    return num_gradients * 2 * positions[0] * prod(positions[2:]) * prod(w)


def _attention_backward_flops(
    _grad: object, q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object
) -> int:
    """Operations of the backward pass of attention: two products for each of the forward pass."""
    return 2 * _attention_flops(q, k, v)


def _attention_flops(q: Sequence[int], _k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    """Operations of the scores and of their product with the values; q is (b, heads, n, d), v (b, heads, m, d)."""
    return 2 * prod(q[:-1]) * v[-2] * (q[-1] + v[-1])
