"""What a step costs, counted, not timed: floating-point operations and bytes of tensors that hold no numbers.

The unit of work is F, one pass of the net forward; a backward pass is 2 F. Counts depend on shapes alone, so operations
are counted on the meta device, whatever the net's size: no memory, no arithmetic. Blocks that are alike cost alike, so
of a deep net only the first few are run (`dumo.run.plan.depth`).

Memory is counted by following every tensor's storage from the operation that made it until it is let go. That needs
the operations a device would run: on meta, attention keeps all its scores, which no fused kernel does. So bytes are
counted on fake tensors, which hold no numbers either, but say that they are on the CPU.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from math import lcm
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dumo.flow import dropout
from dumo.flow.draw import draw
from dumo.flow.guide import Guide as Affine
from dumo.flow.precision import Precision, autocast
from dumo.flow.slope import DualSlope, Way
from dumo.run.plan.count import Bytes, flops, live_bytes
from dumo.run.plan.depth import by_depth, short
from dumo.runtime.random import stream
from dumo.training.frozen import copied, share
from dumo.types import Cond, Frozen, Guide, Heads, Net, Noised, Objective, Path, Sample, frozen

PLAIN = Affine()  # no guidance
LAW = 1_000_000  # rows that a law is judged by
Theta = Literal["self"] | float  # theta^-: the net itself, or an average of it, as `Train.ref`


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
    without = units(objective.model_copy(update={"guide": PLAIN}))
    return without + _guided(objective, guide) * (units(objective) - without)


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
    """Bytes that a step of `rows` rows takes beside weights, gradients and batch, seen as `peak_bytes` sees them.

    So what a piece of a batch takes when an earlier one has left its gradients.
    """

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
    """A record of so many rows with memory of its own on the CPU, and no numbers but what is fixed by place."""
    return _empty(_draw(objective, path, rows, shape))


def _step(net: nn.Module, ref: Frozen, objective: Objective, b: Noised) -> Callable[[], object]:
    """Forward, targets and backward, as in training."""

    def step() -> None:
        with dropout.off():
            objective.loss(net, ref, b).loss.sum().backward()

    return step


def _outlines(net: nn.Module, ref: Theta) -> tuple[nn.Module, Frozen]:
    """The net and theta^- without numbers."""
    net = copy.deepcopy(net).to("meta")
    return net, frozen(net) if ref == "self" else Frozen(copied(net))


def _guided(objective: Objective, guide: Guide) -> float:
    """The expected share of the rows that are guided: the label kept, the time inside the interval."""
    t, _ = objective.times(LAW, stream("cost"))
    return (1 - objective.drop) * guide.inside(t).double().mean().item()


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
