"""Count the floating-point operations of a training step on the meta device.

    forward_flops    operations of a forward pass, per row
    step_cost        operations, forward units and dual strategy of a training step, per row
    forward_units    forward units of a training step, per row
    teacher_passes   teacher evaluations of a training step, per row; the other counts exclude them
    exact_rows       rows of the smallest batch that can be counted exactly
    count_flops      operations of a function
    count_by_depth   any count of a network, extrapolated from its first few blocks

`dumo.run.memory` and `dumo.plan.cluster` count the bytes of the same steps.

The unit is F, a forward pass; a backward pass is 2 F. Counts depend only on shapes, so the meta device suffices. Equal
blocks cost the same, so a count is affine in the number of blocks of each sequence of equal blocks (`Stretch`), and is
extrapolated from the first few blocks.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import groupby, product
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
# Number of sampled times from which the share of rows inside the guidance interval is estimated.
TIMES = 1_000_000
# The count of a network with more blocks is extrapolated from a few of them.
MAX_BLOCKS_RUN = 6
# theta^-: the network itself, or an average of its weights, as `Train.ref`.
Theta = Literal["self"] | float
M = TypeVar("M", bound=nn.Module)


def forward_flops(net: nn.Module, objective: Objective, shape: Sequence[int]) -> float:
    """Count the floating-point operations of a forward pass per row of this shape, two per multiply-add."""
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
    """Return the forward units of a training step. See `step_cost` for the arguments."""
    return step_cost(net, objective, path, shape, rows=rows, ref=ref).units


class StepCost(NamedTuple):
    """The cost of a training step per row (an image or a point)."""

    # flops / pass_flops
    units: float
    # floating-point operations of the step
    flops: float
    # floating-point operations of a forward pass
    pass_flops: float
    # how a dual slope computes du/dt in the first phase of the training; None without a dual slope
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

    If `rows` is None, count the smallest batch that can be counted exactly. Guidance passes are weighted by the
    expected share of rows that need them. If the phases of a training (`Needs.phases`) differ in cost, return the mean.
    Raise UserError if the loss is not one number per row.
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
    """Return the expected share of rows that need guidance passes: label kept, and time in the interval."""
    t, _ = objective.times(TIMES, stream("cost"))
    return (1 - objective.drop) * guide.inside(t).double().mean().item()


@dataclass(frozen=True)
class _StepCounter:
    """Counts the forward units of training steps of a net."""

    net: nn.Module
    path: FlowPath
    # shape of a row
    shape: Sequence[int]
    # batch size
    rows: int
    ref: Theta
    # floating-point operations of a forward pass per row
    pass_flops: float

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
        """Return the units of a step on a batch."""

        def count(net: nn.Module) -> int:
            meta_net, theta = meta_copies(net, self.ref)
            return count_flops(step_function(meta_net, theta, objective, b))

        return count_by_depth(self.net, count) / (self.rows * self.pass_flops)


def teacher_passes(net: nn.Module, objective: Objective, path: FlowPath, shape: Sequence[int]) -> float:
    """Return the teacher evaluations per row of a training step, as a mean over the phases of the training."""
    rows = exact_rows(objective)
    passes = 0.0
    for progress, step, share in _steps_by_cost(objective):
        teacher = _CountingTeacher()
        b = replace(_draw_on_meta(objective, path, rows, shape, teacher), progress=progress, step=step)
        step_function(*meta_copies(net, "self"), objective, b)()
        passes += share * teacher.rows / rows
    return passes


class _CountingTeacher:
    """A teacher that returns v_t and counts the rows of its calls, twice if x_t requires a gradient."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x_t: Sample, t: Time, c: Cond, v_t: Sample) -> Sample:
        self.rows += 2 * len(t) if x_t.requires_grad else len(t)
        return v_t


class _NotedSlope(DualSlope):
    """A dual slope that records the strategies that `slope` chooses."""

    slope: DualSlope
    strategies: list[DualStrategy] = Field(default_factory=list[DualStrategy])

    def strategy(self, net: Net, ref: Frozen, *, known: bool, moving: Moving | None = None) -> DualStrategy:
        """Return the strategy of `slope`, and append it to `strategies`."""
        self.strategies.append(self.slope.strategy(net, ref, known=known, moving=moving))
        return self.strategies[-1]


def exact_rows(objective: Objective) -> int:
    """Return the smallest batch size, at least 2, for which every share of rows of the objective is an integer."""
    times = objective.times
    moving = Fraction(times.moving_share).limit_denominator(1000)
    return lcm(2, times.group, moving.denominator, objective.needs.group)


@torch.no_grad()
def _forward_pass(net: nn.Module, objective: Objective, shape: Sequence[int], rows: int) -> Heads:
    """Run a forward pass over `rows` rows on the meta device."""
    x, c = _meta_batch(rows, shape)
    inputs = {name: x.new_empty(rows) for name in objective.needs.names}
    with dropout.off():
        return copy.deepcopy(net).to("meta")(x, c, **inputs)


def step_function(net: nn.Module, ref: Frozen, objective: Objective, b: NoisyBatch) -> Callable[[], object]:
    """Return a function that runs a step on a batch: forward pass, targets and backward pass, without dropout.

    It raises UserError if the loss is not one number per row.
    """
    rows = len(b.t)

    def step() -> None:
        with without_dropout(net, b):
            terms = require_loss_per_row(objective.loss(net, ref, b), rows, name_of(type(objective)))
            terms.loss.sum().backward()

    return step


def without_dropout(net: nn.Module, b: NoisyBatch) -> AbstractContextManager[object]:
    """Return a context in which tokens are routed as in training and dropout is off, because masks cost little."""
    is_routed = any(getattr(part, "is_routed", False) for part in net.modules())
    keys = dropout.keys(0, 0, len(b.t)).to(b.t.device) if is_routed else None
    return dropout.using(keys, drops=False)


def meta_copies(net: nn.Module, ref: Theta) -> tuple[nn.Module, Frozen]:
    """Return copies of the net and of theta^- on the meta device."""
    net = copy.deepcopy(net).to("meta")
    return net, frozen(net) if ref == "self" else Frozen(copy_net(net))


def _draw_on_meta(
    objective: Objective, path: FlowPath, rows: int, shape: Sequence[int], teacher: TeacherVelocity = path_velocity
) -> NoisyBatch:
    """Return a noisy batch on the meta device. Values that depend only on the row index are real."""
    x, c = _meta_batch(rows, shape)
    return draw(objective, path, x, c, c, seed=0, step=0, teacher=teacher)


def phases(objective: Objective, path: FlowPath, rows: int, shape: Sequence[int]) -> list[tuple[NoisyBatch, float]]:
    """A noised batch on the meta device for each part of the training, with the part's share of all steps.

    Within a part (`Needs.phases`) all steps cost alike, but for those of a cycle (`Needs.cycle`).
    """
    b = _draw_on_meta(objective, path, rows, shape)
    return [(replace(b, progress=progress, step=step), share) for progress, step, share in _steps_by_cost(objective)]


def _steps_by_cost(objective: Objective) -> Iterator[tuple[float, int, float]]:
    """Yield the progress and the number of a step for each cost of a step, with the fraction of all steps."""
    for (progress, share), (step, share_of_cycle) in product(objective.needs.phases, objective.needs.cycle):
        yield progress, step, share * share_of_cycle


def _meta_batch(rows: int, shape: Sequence[int]) -> tuple[Sample, Cond]:
    """Return samples (rows, *shape) and labels (rows,) on the meta device."""
    return torch.empty(rows, *shape, device="meta"), torch.empty(rows, dtype=torch.long, device="meta")


def empty_cpu_batch_like(b: NoisyBatch) -> NoisyBatch:
    """Return an uninitialized noisy batch on the CPU with the shapes of `b`."""
    tensors: dict[str, Tensor] = {}
    for field in fields(b):
        value = getattr(b, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = torch.empty_like(value, device="cpu")
    drawn = {name: torch.empty_like(value, device="cpu") for name, value in b.drawn.items()}
    return replace(b, **tensors, drawn=drawn)


class Stretch(NamedTuple):
    """A sequence of consecutive equal blocks, and the path of the ModuleList that contains them."""

    path: str
    blocks: list[nn.Module]
    # Number of downsamplings before a UNet block; None outside of UNets.
    level: int | None = None


def count_by_depth(net: M, count: Callable[[M], int], *, check: bool = False) -> int:
    """Return `count(net)`, extrapolated from the first few blocks if the net is deep.

    A deep net is counted with one block per stretch, then once per stretch with one more block, and the count is
    extrapolated linearly. Stretches of equal blocks on the same UNet level add the same count per block, so only one of
    them is measured. Most UNets start from zero blocks.

    With `check`, start from two blocks per stretch, and also count with two more in every stretch. If the count is not
    linear, or some stretch adds nothing, count the whole net. Use it for counts such as bytes, in which the first and
    last layers of a net may outweigh a few blocks.
    """
    net_stretches = stretches(net)
    lengths = [len(stretch.blocks) for stretch in net_stretches]
    # blocks of each stretch in the first count
    num_first = 2 if check else 1
    # If the time embedding is trained, even the first block needs the gradient of its input, so all blocks cost the
    # same.
    if is_unet(net) and _trains_time(net):
        num_first = 0
    if sum(lengths) <= MAX_BLOCKS_RUN or max(lengths) <= num_first:
        return count(net)

    # `cut` keeps a whole stretch that has fewer blocks.
    first = [num_first] * len(lengths)
    first_count = count(cut(net, first))
    # the count of one more block, by stretch and by kind of stretch
    added_by_stretch = [0] * len(lengths)
    added_by_kind: dict[object, int] = {}
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
    """A UNet with fewer blocks, in which one block of each kind represents the removed blocks."""

    net: nn.Module
    # the number of removed blocks that a block represents, by its path
    left_out: dict[str, int]


def sample_blocks(net: nn.Module) -> SampledNet:
    """Return a UNet with the first block of each stretch, and two more blocks in the last stretch of each kind.

    Blocks are of one kind if they are equal and on the same level. The block that represents the removed ones lies
    between two blocks, as they do. Modules are shared with `net`, which is not changed.
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
    """Return the net with only the first `lengths[i]` blocks of stretch i. Modules are shared with `net`."""
    lists: dict[str, list[nn.Module]] = {}
    for stretch, n in zip(stretches(net), lengths, strict=True):
        lists.setdefault(stretch.path, []).extend(stretch.blocks[:n])
    return with_submodules(net, {path: nn.ModuleList(blocks) for path, blocks in lists.items()})


def stretches(net: nn.Module) -> list[Stretch]:
    """Return the stretches of a net: sequences of equal blocks, some of which may be removed for a count.

    Pretrained nets have stretches, and so do nets with equal `blocks`, except for the last block and routing. In a UNet
    only transformer blocks form stretches, because its down blocks also feed the up blocks by skip connections.
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
    """Whether a net is a diffusers UNet."""
    return isinstance(net, Dualized) and net.is_unet


def _trains_time(unet: nn.Module) -> bool:
    """Whether a UNet's time embedding is trained, so that all of its blocks need the gradients of their inputs."""
    return any(p.requires_grad for p in unet.get_submodule("model.time_embedding").parameters())


def _stretches_of_unet(net: nn.Module) -> list[Stretch]:
    """Return the stretches of a UNet's transformers, in module order."""
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
    """Return a key that is equal for blocks of equal cost: whether they are routed, and `_unrouted_kind`."""
    is_routed = getattr(block, "is_routed", False)
    return is_routed, *_unrouted_kind(block)


def _unrouted_kind(block: nn.Module) -> tuple[object, ...]:
    """Return a key that is equal for blocks of equal cost apart from routing: class, checkpointing, shapes."""
    is_recomputed = getattr(block, "is_recomputed", False)
    shapes = ((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
    return type(block), is_recomputed, *shapes


def count_flops(work: Callable[[], object]) -> int:
    """Count the floating-point operations of the matrix products and convolutions in `work`, on any device."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes 0.2 s

    aten = torch.ops.aten
    # Operators that torch's table lacks. The recomputation of scores in a fused backward pass is not counted.
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        aten.addmm_: _addmm_flops,
        aten.baddbmm_: _addmm_flops,
        # torch's formula ignores groups.
        aten.convolution_backward: _convolution_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


def _addmm_flops(_out: object, a: Sequence[int], b: Sequence[int], *_: object, **__: object) -> int:
    """Count the operations of an in-place addition of a @ b, from the shapes of a and b."""
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
    """Count the operations of a convolution's backward pass: a forward pass for each gradient (input and weights).

    The arguments are shapes: w is (out, in / groups, ...). `mask` selects the gradients of input, weights and bias.
    """
    positions = x if transposed else grad
    num_gradients = sum(mask[:2])
    return num_gradients * 2 * positions[0] * prod(positions[2:]) * prod(w)


def _attention_backward_flops(
    _grad: object, q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object
) -> int:
    """Count the operations of the backward pass of attention: two products for each product of the forward pass."""
    return 2 * _attention_flops(q, k, v)


def _attention_flops(q: Sequence[int], _k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    """Operations of the scores and of their product with the values; q is (b, heads, n, d), v (b, heads, m, d)."""
    return 2 * prod(q[:-1]) * v[-2] * (q[-1] + v[-1])
