"""d/dt of a net's heads along the flow, in a direction that is known only after the pass.

Along a trajectory x_t moves with velocity w while t moves with 1, so the total derivative of a head u is

    du/dt = (d/ds) u(x_t + s w, t + s)  at s = 0.

Every slope linearizes the net at a point, as `torch.func.linearize` does: the value now, the derivative later.

    heads, along = slope(net, ref, x_t, c, t=t, r=r)     # one pass of net, with gradients
    dv_dt, du_dt = along(w)                              # of ref, without; r and all other inputs rest

Where w is known before the pass, `toward=w` says so; where the derivative is wanted of some rows only, `moving` names
them by place, and the others get zeros. Slopes differ only inside: how many passes `along` makes, and how exact it is.

The order of events: `Linearization.__call__` checks the precision, `begin` chooses how the training pass is made, the
pass is made, and `along` gives the derivatives: as the pass carried them (`_linearize_by_ride`), from its activations
(`_linearize_by_tape`), or by passes of their own (`_linearize_by_passes`, of `slopes`).

A jump's end moves, too: `heads_and_end_rates` gives the heads and d/dr of them, where x and t rest. The loss is of that
derivative itself, so it has gradients.

A secant takes one pass at an earlier time instead (`earlier_mean_velocity`). With l = t - d, and x_l = x_t - d w,

    du/dt  is about  (u(x_t, t) - u(x_l, l)) / d,    off by O(d).

In a target u* = w - (l - r) du/dt it says: go back by d along w, then jump the rest as the net would. Its rounding
grows as (l - r) / d, the gain: with a short d such differences need fp32 as central ones do, which
`require_precise_passes` asks for.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import floor, isinf
from typing import Annotated, Literal, NamedTuple, cast

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.autodiff import dual, tape
from dumo.autodiff import rule as rule  # without which a Dual can do nothing
from dumo.autodiff.cast import autocast_dtype
from dumo.autodiff.dual import pair, primal
from dumo.autodiff.interop import teach_others
from dumo.autodiff.tape import Later
from dumo.flow import dropout
from dumo.flow.precision import uses_tf32
from dumo.types import (
    CHANGES,
    Array,
    Cond,
    Frozen,
    Heads,
    Net,
    Noised,
    Objective,
    Sample,
    Spec,
    Time,
    UserError,
    lift,
    unwrap,
)
from dumo.types.rows import index, split_by_step

Along = Callable[[Sample], Heads]  # the direction w -> dh/dt of each head h along it
Begin = Callable[..., tuple[Heads, Along]]  # a training pass: of (x, c, t=t, **rest)
Moving = Sequence[bool]  # which rows move, by place: not a tensor, so that shapes are static
Places = Int[Tensor, " k"] | slice  # of some rows in a batch
_ALL = slice(None)  # the places of all rows

# The largest h * time_scale of a central difference: it is well within 1 % there, 3 % off at ten times (measured): ours
_MAX_SCALED_STEP = 0.05
# How far off a slope may be, a share of the derivative's norm: an exact one is 1 to 2 % off under bf16, a broken one
# 40 % and more (measured): ours
MAX_SLOPE_ERROR = 0.05
# The largest gain below fp32: rounding to bf16, 2^-8 of u, is then 8 % of the residual: ours
MAX_GAIN = 20


class Linearization(Spec, ABC):
    """A slope: a way to take the derivative of a net along the flow."""

    def __call__(
        self,
        net: Net,
        ref: Frozen,
        x: Sample,
        c: Cond,
        *,
        t: Time,
        toward: Sample | None = None,
        moving: Moving | None = None,
        **rest: Time,
    ) -> tuple[Heads, Along]:
        """The heads of one pass of net, with gradients, and a function that gives the derivatives of ref along w.

        net: the network in training.
        ref: theta^-, of which the derivative is; it may be of the same weights.
        x, c, t, rest: the inputs of the pass, of b rows.
        toward: the direction, where it is known before the pass; then `along` takes no other.
        moving: the rows whose derivative is wanted; None: all.

        Raises UserError where the precision that holds now is too low for this slope.
        """
        self.check(precision_of(x))
        return self.begin(net, ref, toward, moving)(x, c, t=t, **rest)

    def begin(self, net: Net, ref: Frozen, toward: Sample | None, moving: Moving | None) -> Begin:
        """The function of (x, c, t=t, **rest) that makes the pass: a plain one here, passes for the slopes follow."""
        return partial(_linearize_by_passes, partial(self.slopes, ref), net, moving)

    @abstractmethod
    def slopes(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **rest: Time) -> Heads:
        """The derivatives of ref's heads along w, by passes of their own, without gradients through them."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Raise UserError where the slope would be no derivative. An exact one refuses no precision, no time_scale."""


class CentralSlope(Linearization):
    """Central difference, two passes of ref at t - h and t + h: no JVP (paper, Sec. 3.3; h as UCGM).

    Both ends stay as they fall, so t may leave [0, 1] by h: clamping would make the difference one-sided at t = 1,
    where one-step sampling runs. Needs fp32: under bf16 rounding outweighs the difference (measured: 42 to 83 % wrong,
    and 7 % with the factors of products rounded to TF32).
    """

    kind: Literal["central"] = "central"
    h: float = Field(default=0.005, gt=0, le=0.1)

    def slopes(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **rest: Time) -> Heads:
        """The derivatives of ref's heads along w, by two passes."""
        behind = ref(x - self.h * w, c, t=t - self.h, **rest)
        ahead = ref(x + self.h * w, c, t=t + self.h, **rest)
        return tuple((b - a) / (2 * self.h) for a, b in zip(behind, ahead, strict=True))

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Raise UserError below fp32, and where h is a long step to the net."""
        if precision != "fp32":
            raise UserError(
                f"slope 'central' needs precision fp32, not {precision}: at h = {self.h} rounding outweighs the "
                "difference (42 to 83 % wrong under bf16, 7 % under tf32). Use precision fp32, or slope 'dual'"
            )
        if self.h * time_scale > _MAX_SCALED_STEP:
            max_h = floor(1e6 * _MAX_SCALED_STEP / time_scale) / 1e6
            raise UserError(
                f"slope 'central' with h = {self.h} on a net with time_scale = {time_scale}: h * time_scale is above "
                f"{_MAX_SCALED_STEP}, and the difference is no longer a derivative. Use h <= {max_h:g}, a smaller "
                "time_scale or slope 'dual'"
            )


class JvpSlope(Linearization):
    """Exact, by forward-mode differentiation of ref: a pass of its own, with the math kernel of attention."""

    kind: Literal["jvp"] = "jvp"

    def slopes(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **rest: Time) -> Heads:
        """The derivatives of ref's heads along w, by one differentiated pass."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
            _, slopes = _jvp(lambda x, t: ref(x, c, t=t, **rest), (x, t), (w, torch.ones_like(t)))
        return slopes


class Way(NamedTuple):
    """How `DualSlope` gets the tangent, and why so."""

    name: Literal["tape", "ride", "pass"]
    why: str

    @property
    def text(self) -> str:
        """When the tangent is computed, in words."""
        return {
            "tape": "after the training pass, from its activations",
            "ride": "along with the training pass",
            "pass": "by a pass of its own",
        }[self.name]


class DualSlope(Linearization):
    """Exact, by dual numbers (`dumo.autodiff.dual`, ours): the tangent rides on the pass with gradients, for one pass
    more.

    Ride: the direction is known, and the tangent goes along with the pass; of some rows, it is two passes. Tape: it is
    not, and the tangent is computed after the pass, from the activations that the backward pass needs anyway. Pass:
    where these or the weights are not there to use (a moving average as theta^-, checkpointing, sharded weights that
    are given back after the pass), a dual pass of its own without gradients: two passes, as the central difference, and
    still exact.
    """

    kind: Literal["dual"] = "dual"

    def begin(self, net: Net, ref: Frozen, toward: Sample | None, moving: Moving | None) -> Begin:
        """The function of (x, c, t=t, **rest) that makes the pass, by tape, ride or passes (`way`)."""
        if not torch.compiler.is_compiling():
            teach_others()
        way = self.way(net, ref, known=toward is not None)
        if way.name == "tape" and moving is None:
            return partial(_linearize_by_tape, partial(self.slopes, ref), net, ref)
        if way.name == "ride" and toward is not None:
            return partial(_linearize_by_ride, net, toward, moving)
        return super().begin(net, ref, toward, moving)

    def way(self, net: Net, ref: Frozen, *, known: bool) -> Way:
        """Which of the three ways is taken; `known`: whether the direction is known before the pass."""
        if ref.module is not unwrap(net):
            return Way("pass", "theta^- has weights of its own")
        if known:
            return Way("ride", "the direction is known before the pass")
        if any(getattr(m, "gradient_checkpointing", False) for m in ref.module.modules()):
            return Way("pass", "checkpointing lets the activations go")
        return Way("tape", "the direction is known after the pass")

    def slopes(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **rest: Time) -> Heads:
        """The derivatives of ref's heads along w, by one dual pass."""
        return tuple(rate_of(head) for head in _dual_pass(ref, x, c, w, t=t, **rest))


Slope = Annotated[CentralSlope | DualSlope | JvpSlope, Field(discriminator="kind", json_schema_extra=CHANGES)]


def slope_of(objective: Objective) -> Slope | None:
    """The slope that an objective's loss takes; None where the loss has no du/dt."""
    return cast("Slope | None", objective.needs.slope)


def _linearize_by_tape(
    slopes: Callable[..., Heads], net: Net, ref: Frozen, x: Sample, c: Cond, *, t: Time, **rest: Time
) -> tuple[Heads, Along]:
    """One pass that records what its tangent needs; `along` plays that, once.

    If the weights are gone by then, `along` falls back to `slopes`, a pass of its own.
    """
    dx = Later(x.shape, x.dtype)
    dt = Later(t.shape, t.dtype)
    heads = net(pair(x, dx), c, t=pair(t, dt), **rest)
    tangents = [dual.tangent(head) for head in heads]
    ends = [tangent for tangent in tangents if isinstance(tangent, Later)]

    def along(w: Sample) -> Heads:
        if dx.value is not None:
            raise RuntimeError("along was called twice: a tape plays once, for all heads")
        dx.value = w.detach()
        dt.value = torch.ones_like(t)
        if not (torch.compiler.is_compiling() or tape.is_complete(ends)):
            warnings.warn(
                "du/dt takes a pass of its own, so a step is a fifth longer: sharded weights are given back after it. "
                "Keep them: fully_shard(..., reshard_after_forward=False), in dumo train train.reshard=false",
                stacklevel=3,
            )
            return slopes(x, c, w, t=t, **rest)
        play = tape.compiled_play() if getattr(ref.module, "compile_tangents", False) else tape.play
        play(ends)
        return tuple(rate_of(head) for head in heads)

    return tuple(primal(head) for head in heads), along


def _linearize_by_ride(
    net: Net, toward: Sample, moving: Moving | None, x: Sample, c: Cond, *, t: Time, **rest: Time
) -> tuple[Heads, Along]:
    """One pass whose rows move from the start; where some rest, a second pass for those."""

    def moving_pass(i: Places) -> Heads:
        return _dual_pass(net, x[i], c[i], toward[i], t=t[i], **_rows_of_each(rest, i))

    def resting_pass(j: Places) -> Heads:
        return net(x[j], c[j], t=t[j], **_rows_of_each(rest, j))

    values, slopes = _values_and_rates(moving_pass, resting_pass, moving, x)

    def along(w: Sample) -> Heads:
        if w is not toward:
            raise ValueError("along(w): w must be the direction that the pass was given as `toward`")
        return slopes

    return values, along


def heads_and_end_rates(
    net: Net, x: Sample, c: Cond, *, r: Time, moving: Moving | None = None, **inputs: Time
) -> tuple[Heads, Heads]:
    """The net's heads and their derivatives in r, the end of a jump, both with gradients; x, t and all else rest.

    moving: the rows whose derivative is wanted, which get a pass of their own; None: all. The others get zeros.

    It is a dual pass, with reverse-mode around it: of what r reaches in the net, it costs two passes, and so does its
    backward pass. Not by `torch.func.jvp`: reverse-mode around that is silently wrong through `F.layer_norm`
    (torch 2.13, pytorch #196700), and kernels of fused attention differentiate once.
    """

    def moving_pass(i: Places) -> Heads:
        r_i = r[i]
        return net(x[i], c[i], r=pair(r_i, torch.ones_like(r_i), recorded=True), **_rows_of_each(inputs, i))

    def resting_pass(j: Places) -> Heads:
        return net(x[j], c[j], r=r[j], **_rows_of_each(inputs, j))

    return _values_and_rates(moving_pass, resting_pass, moving, x)


def _values_and_rates(
    moving_pass: Callable[[Places], Heads], resting_pass: Callable[[Places], Heads], moving: Moving | None, x: Sample
) -> tuple[Heads, Heads]:
    """The values and the rates of all heads on all rows of x: zero rates on the rows that do not move.

    moving_pass: makes a pass of the rows at some places, whose inputs move, and returns duals.
    resting_pass: makes a plain pass of the rows at some places.
    """
    rows, others = _split_rows(moving, len(x))
    if not others:
        heads = moving_pass(_ALL)
        return tuple(primal(head) for head in heads), tuple(rate_of(head) for head in heads)
    if not rows:
        values = resting_pass(_ALL)
        return values, tuple(torch.zeros_like(value) for value in values)
    i = index(rows, x.device)
    j = index(others, x.device)
    with dropout.rows(i):
        heads = moving_pass(i)
    with dropout.rows(j):
        plain = resting_pass(j)
    head_pairs = list(zip(heads, plain, strict=True))
    values = tuple(_merge_rows(primal(a), b, rows, others) for a, b in head_pairs)
    rates = tuple(_merge_rows(rate_of(a), torch.zeros_like(b), rows, others) for a, b in head_pairs)
    return values, rates


def _dual_pass(net: Net, x: Sample, c: Cond, w: Sample, /, *, t: Time, **rest: Time) -> Heads:
    """The heads, as duals, of a pass whose inputs move: x along w, t by 1."""
    return net(pair(x, w.detach()), c, t=pair(t, torch.ones_like(t)), **rest)


def rate_of(head: Array) -> Tensor:
    """The tangent of a head that a dual pass returned: zero for one that the moving inputs do not reach."""
    rate = dual.tangent(head)
    if isinstance(rate, Later):
        rate = rate.value
    if rate is None:
        return torch.zeros_like(primal(head))
    return rate


def _linearize_by_passes(
    slopes: Callable[..., Heads], net: Net, moving: Moving | None, x: Sample, c: Cond, *, t: Time, **rest: Time
) -> tuple[Heads, Along]:
    """One pass of net now; `along` makes the passes of `slopes`, of the rows that move. The others get zeros.

    Where no row moves, `along` makes no pass.
    """
    heads = net(x, c, t=t, **rest)
    moving_rows, resting_rows = _split_rows(moving, len(x))

    @torch.no_grad()
    def along(w: Sample) -> Heads:
        if not resting_rows:
            return slopes(x, c, w, t=t, **rest)
        if not moving_rows:
            return tuple(torch.zeros_like(head) for head in heads)
        i = index(moving_rows, x.device)
        j = index(resting_rows, x.device)
        with dropout.rows(i):
            moving_slopes = slopes(x[i], c[i], w[i], t=t[i], **_rows_of_each(rest, i))
        merged: list[Tensor] = []
        for slope, head in zip(moving_slopes, heads, strict=True):
            merged.append(_merge_rows(slope, torch.zeros_like(head[j]), moving_rows, resting_rows))
        return tuple(merged)

    return heads, along


def _split_rows(moving: Moving | None, n: int) -> tuple[list[int], list[int]]:
    """The numbers of the rows that move, and of those that rest; None: all n move."""
    return split_by_step([True] * n if moving is None else moving)


def _rows_of_each(inputs: Mapping[str, Tensor], i: Places) -> dict[str, Tensor]:
    """The rows at places i of each input."""
    return {name: values[i] for name, values in inputs.items()}


def _merge_rows(some: Tensor, other: Tensor, rows: list[int], others: list[int]) -> Tensor:
    """One tensor, with `some` at the places `rows` and `other` at the places `others`, in the dtype of `some`."""
    order = sorted(range(len(rows) + len(others)), key=[*rows, *others].__getitem__)
    return torch.cat([some, other.to(some.dtype)])[index(order, some.device)]


def precision_of(x: Sample) -> str:
    """The name of the precision of a pass on x: "fp32", also for float64; "tf32"; or a dtype, with "autocast"."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        return f"{dtype} autocast"
    if x.dtype == torch.float32 and uses_tf32(x.device.type):
        return "tf32"
    if x.dtype in (torch.float32, torch.float64):
        return "fp32"
    return str(x.dtype)


def _jvp(
    f: Callable[[Sample, Time], Heads], at: tuple[Sample, Time], along: tuple[Sample, Time]
) -> tuple[Heads, Heads]:
    """`torch.func.jvp` without its third result, which it is typed as if it might return."""
    value, slope = torch.func.jvp(f, at, along)  # pyright: ignore[reportAssignmentType]
    return value, slope


def require_precise_passes(b: Noised, gain: float, kind: str) -> None:
    """Raise UserError where passes on a record round more than objective `kind`, of this gain, can bear."""
    require_precision(precision_of(b.x_t), gain, kind)


def require_precision(precision: str, gain: float, kind: str) -> None:
    """Raise UserError where passes of this precision round more than objective `kind`, of this gain, can bear."""
    if gain > MAX_GAIN and precision != "fp32":
        times = "without bound" if isinf(gain) else f"by up to {gain:g}"
        raise UserError(
            f"objective '{kind}' needs precision fp32, not {precision}: it multiplies the rounding of the net {times}. "
            "Use train.precision=fp32, a longer step, or objective 'meanflow' with slope 'dual'"
        )


@torch.no_grad()
def earlier_mean_velocity(ref: Frozen, b: Noised, w: Sample, d: Time) -> Sample:
    """u(x_l, l, r) at l = t - d with x_l = x_t - d w, of a net of one head: for the rows that may move, else zeros.

    Where l is below r it is u(x_l, l, l): the caller gives such rows no weight. One pass, none if no row may move.
    """
    moving_rows, _ = b.rows_by_step
    u_l = torch.zeros_like(b.x_t)
    if not moving_rows:
        return u_l
    i = index(moving_rows, d.device)
    moving = b[moving_rows]
    d = d[i]
    l = (moving.t - d).clamp(min=0)  # noqa: E741, SoFlow's letter
    x_l = moving.x_t - lift(d, moving.x_t) * w[i]
    with dropout.rows(i):
        (head,) = ref(x_l, moving.c, t=l, r=torch.minimum(moving.r, l))
    return u_l.to(head).index_copy(0, i, head)
