"""What a step costs, counted, not timed: floating-point operations and bytes of tensors that hold no numbers.

The unit of work is F, one pass of the net forward; a backward pass is 2 F. Counts depend on shapes alone, so operations
are counted on the meta device, whatever the net's size: no memory, no arithmetic. Blocks that are alike cost alike, so
a count is affine in the length of each stretch of such blocks: the first few give that of all.

Memory is counted by following every tensor's storage from the operation that made it until it is freed. That needs the
operations that a device would run: on meta, attention keeps all its scores, which no fused kernel does. So bytes are
counted on fake tensors, which hold no numbers either, but say that they are on the CPU.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from itertools import groupby
from math import lcm, prod
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dumo.flow import dropout
from dumo.flow.check import require_terms
from dumo.flow.draw import draw
from dumo.flow.guide import Guide as Affine
from dumo.flow.precision import Precision, autocast
from dumo.flow.slope import DualSlope, Way
from dumo.nets import twin
from dumo.nets.dualized import Dualized
from dumo.runtime.random import stream
from dumo.training.frozen import copied, share
from dumo.types import Cond, Frozen, Guide, Heads, Net, Noised, Objective, Path, Sample, frozen
from dumo.types.outside import name_of

PLAIN = Affine()  # no guidance
LAW = 1_000_000  # rows that a law is judged by
FEW = 6  # blocks up to which all are run: ours
Theta = Literal["self"] | float  # theta^-: the net itself, or an average of it, as `Train.ref`
M = TypeVar("M", bound=nn.Module)


class Bytes(NamedTuple):
    """Bytes of tensors that a piece of work met: those there before it, and most of its own alive at one time."""

    before: int
    peak: int


def forward_flops(net: nn.Module, objective: Objective, shape: Sequence[int]) -> float:
    """Floating-point operations of one pass, per row (two per multiply-add)."""
    rows = 2
    return by_depth(net, lambda net: flops(lambda: _pass(net, objective, shape, rows))) / rows


def heads(net: nn.Module, objective: Objective, shape: Sequence[int], *, rows: int) -> Heads:
    """What a pass gives, without numbers."""
    return _pass(short(net), objective, shape, rows)


def forward_units(
    net: nn.Module,
    objective: Objective,
    path: Path,
    shape: Sequence[int],
    *,
    rows: int | None = None,
    ref: Theta = "self",
) -> float:
    """Floating-point operations of a training step over those of one pass: forward, targets and backward.

    Of a batch of `rows` (None: one in which every share of the rows is a whole number of them). The passes of guidance
    count by the expected share of the rows that need them. Where steps cost more in one part of the training than in
    another (`phases` of the objective), their mean.
    """
    rows, one = rows or exact_rows(objective), forward_flops(net, objective, shape)

    def at(objective: Objective, b: Noised) -> float:
        return by_depth(net, lambda net: flops(_step(*_outlines(net, ref), objective, b))) / (rows * one)

    def units(objective: Objective) -> float:
        return sum(share * at(objective, b) for b, share in _phases(objective, path, rows, shape))

    guide = objective.needs.guide
    if not (isinstance(guide, Guide) and guide.active):
        return units(objective)
    without, (t, _) = units(objective.model_copy(update={"guide": PLAIN})), objective.times(LAW, stream("cost"))
    guided = (1 - objective.drop) * guide.inside(t).double().mean().item()  # a label kept, a time inside the interval
    return without + guided * (units(objective) - without)


class StepCost(NamedTuple):
    """What a training step costs for an image."""

    units: float  # `forward_units`
    flops: float  # floating-point operations


def step_cost(
    net: nn.Module, objective: Objective, path: Path, shape: Sequence[int], *, ref: Theta = "self"
) -> StepCost:
    """Both counts of a step. Takes and raises as `forward_units`."""
    units = forward_units(net, objective, path, shape, ref=ref)
    return StepCost(units, units * forward_flops(net, objective, shape))


def way(net: nn.Module, objective: Objective, path: Path, shape: Sequence[int], *, ref: Theta = "self") -> Way | None:
    """How a slope that rides comes by its tangent in a step of this objective; None for any other slope."""
    if not isinstance(objective.needs.slope, DualSlope):
        return None
    noted, b = _Noted(), _draw(objective, path, exact_rows(objective), shape)
    _step(*_outlines(short(net), ref), objective.model_copy(update={"slope": noted}), b)()
    return noted.ways[-1] if noted.ways else None  # none where no step at this progress takes it


class _Noted(DualSlope):
    """A dual slope that notes its ways."""

    ways: list[Way] = Field(default_factory=list[Way])

    def way(self, net: Net, ref: Frozen, *, known: bool) -> Way:
        """As every dual slope."""
        self.ways.append(super().way(net, ref, known=known))
        return self.ways[-1]


def peak_bytes(
    net: nn.Module,
    objective: Objective,
    path: Path,
    shape: Sequence[int],
    *,
    rows: int,
    ref: Theta = "self",
    precision: Precision = "fp32",
) -> Bytes:
    """Bytes of a training step of `rows` rows on a CPU: net and batch before it; activations, gradients, targets in it.

    In the part of the training that takes the most. What a kernel takes for itself while it runs is not seen.
    """
    phases = _phases(objective, path, rows, shape)
    peaks = (_peak(net, objective, b, ref, precision, graded=False) for b, _ in phases)
    return max(peaks, key=lambda found: found.peak)


def activation_bytes(
    net: nn.Module,
    objective: Objective,
    path: Path,
    shape: Sequence[int],
    *,
    rows: int,
    ref: Theta = "self",
    precision: Precision = "fp32",
) -> int:
    """Bytes that a step of `rows` rows takes on top of weights, gradients and batch, seen as `peak_bytes` sees them."""

    def at(b: Noised) -> int:
        return by_depth(net, lambda net: _peak(net, objective, b, ref, precision, graded=True).peak, check=True)

    return max(at(b) for b, _ in _phases(objective, path, rows, shape))


def exact_rows(objective: Objective) -> int:
    """The fewest rows, at least 2, of which every share that an objective treats apart is a whole number."""
    times = objective.times
    moving = Fraction(times.moving_share).limit_denominator(1000)
    return lcm(2, times.group, moving.denominator, objective.needs.group)


@torch.no_grad()
def _pass(net: nn.Module, objective: Objective, shape: Sequence[int], rows: int) -> Heads:
    """One pass on the meta device."""
    x, c = _nothing(rows, shape)
    inputs = {name: x.new_empty(rows) for name in objective.needs.names}
    with dropout.off():
        return copy.deepcopy(net).to("meta")(x, c, **inputs)


def _peak(net: nn.Module, objective: Objective, b: Noised, ref: Theta, precision: Precision, *, graded: bool) -> Bytes:
    """Bytes before a step and in it, on fake tensors; `graded`: the gradients are there before."""
    net, theta = _outlines(net, ref)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in {net, theta.module}:
            module.to_empty(device="cpu")
        share(theta.module, net)
        for p in net.parameters():
            p.grad = torch.empty_like(p) if graded and p.requires_grad else None
        with autocast(precision, "cpu"):
            return live_bytes(_step(net, theta, objective, _empty(b)))


def blank(objective: Objective, path: Path, rows: int, shape: Sequence[int]) -> Noised:
    """A record of this many rows with memory of its own on the CPU, and no numbers but what is fixed by place."""
    return _empty(_draw(objective, path, rows, shape))


def _step(net: nn.Module, ref: Frozen, objective: Objective, b: Noised) -> Callable[[], object]:
    """Forward, targets and backward, as in training: without dropout, whose masks cost little, and with routing.

    It raises UserError where the loss is none of one number per row.
    """
    routed = any(getattr(part, "routed", False) for part in net.modules())
    keys = dropout.keys(0, 0, len(b.t)).to(b.t.device) if routed else None

    def step() -> None:
        with dropout.using(keys, drops=False):
            require_terms(objective.loss(net, ref, b), len(b.t), name_of(type(objective))).loss.sum().backward()

    return step


def _outlines(net: nn.Module, ref: Theta) -> tuple[nn.Module, Frozen]:
    """The net and theta^- without numbers."""
    net = copy.deepcopy(net).to("meta")
    return net, frozen(net) if ref == "self" else Frozen(copied(net))


def _draw(objective: Objective, path: Path, rows: int, shape: Sequence[int]) -> Noised:
    """A record without numbers, but for what is fixed by place."""
    x, c = _nothing(rows, shape)
    return draw(objective, path, x, c, c, seed=0, step=0)


def _phases(objective: Objective, path: Path, rows: int, shape: Sequence[int]) -> list[tuple[Noised, float]]:
    """The same for every part of the training where steps cost alike, with its share of all steps."""
    b = _draw(objective, path, rows, shape)
    return [(replace(b, progress=progress), share) for progress, share in objective.needs.phases]


def _nothing(rows: int, shape: Sequence[int]) -> tuple[Sample, Cond]:
    return torch.empty(rows, *shape, device="meta"), torch.empty(rows, dtype=torch.long, device="meta")


def _empty(b: Noised) -> Noised:
    """The record with memory of its own on the CPU."""
    own = {f.name: torch.empty_like(v, device="cpu") for f in fields(b) if isinstance(v := getattr(b, f.name), Tensor)}
    return replace(b, **own, drawn={name: torch.empty_like(v, device="cpu") for name, v in b.drawn.items()})


class Stretch(NamedTuple):
    """Blocks that are alike and run one after another, and the path of the list that they are in."""

    path: str
    blocks: list[nn.Module]


def by_depth(net: M, count: Callable[[M], int], *, check: bool = False) -> int:
    """A count of a net: of all of it, or, where it is deep, as follows from its first few blocks of each stretch.

    `check`: where the ends of a net may outweigh a few blocks, as of bytes. Then the first count has two blocks of each
    stretch, and all are counted unless two more of every stretch add twice what one more of each adds.
    """
    lengths, few = [len(stretch.blocks) for stretch in stretches(net)], 2 if check else 1
    deep = [i for i, n in enumerate(lengths) if n > few]
    if sum(lengths) <= FEW or not deep:
        return count(net)

    def at(*more: int) -> int:
        return count(cut(net, [min(n, few + k) for n, k in zip(lengths, more, strict=True)]))

    first = at(*[0] * len(lengths))
    steps = [at(*(i == j for j in range(len(lengths)))) - first if n > few else 0 for i, n in enumerate(lengths)]
    if check:
        two = sum(min(n - few, 2) * step for n, step in zip(lengths, steps, strict=True))
        if not all(steps[i] for i in deep) or at(*[2] * len(lengths)) != first + two:
            return count(net)
    return first + sum((n - few) * step for n, step in zip(lengths, steps, strict=True))


def short(net: M) -> M:
    """The net with the first block of each stretch alone."""
    return cut(net, [1 for _ in stretches(net)])


def cut(net: M, lengths: Sequence[int]) -> M:
    """The net with this many first blocks of each stretch. All parts are shared, and the net is left as it is."""
    kept: dict[str, list[nn.Module]] = {}
    for stretch, n in zip(stretches(net), lengths, strict=True):
        kept.setdefault(stretch.path, []).extend(stretch.blocks[:n])
    return twin.with_submodules(net, {path: nn.ModuleList(blocks) for path, blocks in kept.items()})


def stretches(net: nn.Module) -> list[Stretch]:
    """All of a net whose blocks may be left out: a pretrained one, or one of `blocks` alike but for the last,
    and for the routed ones.

    Of a UNet none may be, for each hands on to one on the other side.
    """
    if isinstance(net, Dualized) and net.family.last == "conv_out":
        return []
    if isinstance(net, Dualized):
        lists = {f"model.{name}": part for name, part in net.model.named_children() if isinstance(part, nn.ModuleList)}
    else:
        blocks = getattr(net, "blocks", None)
        lists = {"blocks": blocks} if isinstance(blocks, nn.ModuleList) else {}
        if len({kind(block)[1:] for part in lists.values() for block in [*part][:-1]}) > 1:
            return []
    return [Stretch(path, [*alike]) for path, blocks in lists.items() for _, alike in groupby(blocks, kind)]


def kind(block: nn.Module) -> tuple[object, ...]:
    """What blocks that cost alike have in common: whether they are routed or computed again, class and shapes."""
    shapes = ((name, p.shape, p.requires_grad) for name, p in block.named_parameters())
    return getattr(block, "routed", False), type(block), getattr(block, "lean", False), *shapes


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and convolutions, on whatever device they are."""
    aten = torch.ops.aten
    missing = {  # from torch's own table; that a fused backward computes the scores again is not counted
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *__, **___: 2 * _attention(q, v),
        aten.addmm_: lambda _, a, b, *__, **___: 2 * prod(a) * b[-1],
        aten.baddbmm_: lambda _, a, b, *__, **___: 2 * prod(a) * b[-1],
        aten.convolution_backward: _convolved_back,  # torch's does not know of groups
    }
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        work()
    return counter.get_total_flops()


def live_bytes(work: Callable[[], object]) -> Bytes:
    """Follow the bytes of all tensors that a piece of work meets, on whatever device they are, fake ones too."""
    with _Live() as live:
        work()
    return Bytes(live.before, live.peak)


class _Live(TorchDispatchMode):
    """Sees every operation beneath autograd, backward passes included, and so every storage on its way in or out."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.now = self.peak = 0
        self._known: dict[int, int] = {}  # storages alive: bytes that count in `now`

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation. A storage first seen going in was there before; one first seen coming out is new."""
        for storage in _storages((args, kwargs)):
            if self._meet(storage, 0):
                self.before += storage.nbytes()
        out = func(*args, **kwargs or {})
        for storage in _storages(out):
            self._meet(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _meet(self, storage: torch.UntypedStorage, size: int) -> bool:
        """Whether a storage is seen for the first time; it counts `size` bytes until the last tensor on it is gone."""
        key = id(storage)  # torch shows a storage as one object while it lives
        if key in self._known:
            return False
        self._known[key] = size
        self.now += size
        weakref.finalize(storage, self._leave, key).atexit = False
        return True

    def _leave(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))


def _convolved_back(
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
    """Each of the gradients of input and weights takes what the convolution took; w is (out, in / groups, ...)."""
    places = x if transposed else grad
    return sum(mask[:2]) * 2 * places[0] * prod(places[2:]) * prod(w)


def _attention(q: Sequence[int], v: Sequence[int]) -> int:
    """Scores and their product with the values; q is (b, heads, n, d), v (b, heads, m, d)."""
    return 2 * prod(q[:-1]) * v[-2] * (q[-1] + v[-1])
