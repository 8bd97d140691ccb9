"""Slopes: the ways to take du/dt along the flow, which a run names as `objective.slope`.

Along a trajectory x_t moves with velocity w while t moves with 1. So the derivative of a head u along the flow is

    du/dt = (d/ds) u(x_t + s w, t + s)  at s = 0.

A loss needs the net's heads at a point before it knows w, and the derivatives after. So a slope linearizes the net
there, as `torch.func.linearize` does: the heads now, the derivatives later.

    heads, along = slope(net, ref, x_t, c, t=t, r=r)  # one pass of net, with gradients
    dv_dt, du_dt = along(w)                           # of ref, without; r and all other inputs are held constant

The order of events:

1. A loss takes its slope (`slope_of`) and calls it. `toward=w` says w where it is known before the pass; `moving` names
   the rows whose derivative is wanted, and the others get zeros.
2. A slope that needs fp32 checks the precision that holds now (`BaseSlope.check`).
3. It hands over to a function of `dumo.flow.linearize`, which makes the training pass and returns `(heads, along)`.
   Autograd records the heads, and never the derivatives.
4. The loss calls `along(w)`.

The specs, one for each `kind`, of which `Slope` is the union:

    central  two passes at t - h and t + h; needs fp32
    jvp      one pass by `torch.func.jvp`; exact
    dual     dual numbers, with the training pass where that is possible (`DualSlope.way`); exact
"""

from abc import ABC, abstractmethod
from math import floor
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.autodiff.dual import teach_others
from dumo.flow.linearize import Along as Along
from dumo.flow.linearize import (
    Moving,
    dual_pass,
    linearize_by_passes,
    linearize_by_ride,
    linearize_by_tape,
    tangent_or_zeros,
)
from dumo.flow.precision import precision_of
from dumo.types import CHANGES, Cond, Frozen, Heads, Net, Objective, Sample, Spec, Time, UserError, unwrap

# The largest h * time_scale of a central difference. Ours: it is well within 1 % there, and 3 % off at ten times that
# (measured).
_MAX_SCALED_STEP = 0.05
# How far off a slope may be, over the derivative's norm, where `flow.derivative` or `run.examination` compares it.
# Ours: an exact one is 1 to 2 % off under bf16, a broken one 40 % and more (measured).
MAX_SLOPE_ERROR = 0.05


class BaseSlope(Spec, ABC):
    """The base of all slopes. A subclass says in `derivatives` how it takes them by passes of their own."""

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
        **inputs: Time,
    ) -> tuple[Heads, Along]:
        """The heads of one pass of net, with gradients, and `along`, which gives the derivatives of ref without.

        net: the network in training.
        ref: theta^-, of which the derivative is; it may be of the same weights.
        x, c, t, inputs: the inputs of the pass, of b rows.
        toward: the direction, where it is known before the pass; then `along` takes no other.
        moving: the rows whose derivative is wanted; None: all.

        Raises UserError where the precision that holds now is too low for this slope.
        """
        self.check(precision_of(x))
        return linearize_by_passes(self.derivatives, net, ref, x, c, moving=moving, t=t, **inputs)

    @abstractmethod
    def derivatives(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
        """The derivative of each of ref's heads as x moves along w, (b, ...), and t with 1, by passes of their own."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Raise UserError where the slope would be no derivative. An exact slope is one in any precision.

        precision: a name, as `precision_of` gives it.
        time_scale: by which the net multiplies t.
        """


class CentralSlope(BaseSlope):
    """Central difference, two passes of ref at t - h and t + h: no JVP (paper, Sec. 3.3; h as UCGM).

    Both ends stay as they fall, so t may leave [0, 1] by h: clamping would make the difference one-sided at t = 1,
    where one-step sampling runs. Needs fp32: under bf16 rounding outweighs the difference (measured: 42 to 83 % wrong,
    and 7 % with the factors of products rounded to TF32).
    """

    kind: Literal["central"] = "central"
    h: float = Field(default=0.005, gt=0, le=0.1)

    def derivatives(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
        """The derivative of each of ref's heads along w, by two passes."""
        behind = ref(x - self.h * w, c, t=t - self.h, **inputs)
        ahead = ref(x + self.h * w, c, t=t + self.h, **inputs)
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


class JvpSlope(BaseSlope):
    """Exact, by forward-mode differentiation of ref: a pass of its own, with the math kernel of attention."""

    kind: Literal["jvp"] = "jvp"

    def derivatives(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
        """The derivative of each of ref's heads along w, by one differentiated pass."""

        def heads_at(x: Sample, t: Time) -> Heads:
            return ref(x, c, t=t, **inputs)

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
            heads_and_tangents = torch.func.jvp(heads_at, (x, t), (w, torch.ones_like(t)))
        _, tangents = cast("tuple[Heads, Heads]", heads_and_tangents)  # typed as if there were a third result
        return tangents


class Way(NamedTuple):
    """How a `DualSlope` takes the derivatives."""

    name: Literal["tape", "ride", "pass"]
    why: str  # a clause for reports

    @property
    def text(self) -> str:
        """When the derivatives are computed, as reports say it."""
        return {
            "tape": "after the training pass, from its activations",
            "ride": "along with the training pass",
            "pass": "by a pass of its own",
        }[self.name]


class DualSlope(BaseSlope):
    """Exact, by dual numbers (`dumo.autodiff.dual`, ours): with the training pass where that is possible.

    The three ways, of which `way` chooses:

    - ride: the direction is known before the pass, which computes the derivatives on its way. Where only some rows
      move, the others get a pass of their own.
    - tape: the direction is known after the pass. The derivatives are computed from the activations, which the backward
      pass needs anyway.
    - pass: a dual pass of its own, without gradients. Its cost is that of two passes, as of a central difference, and
      it is exact. It is taken where the activations or the weights are not there to use (a moving average as theta^-,
      checkpointing, sharded weights that are given back after the pass); and where the direction is known after the
      pass and only some rows move, because their pass is shorter than a tape of all.
    """

    kind: Literal["dual"] = "dual"

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
        **inputs: Time,
    ) -> tuple[Heads, Along]:
        """The heads of one pass of net, and `along`: takes and returns what `BaseSlope.__call__` does.

        It is exact in any precision, so it refuses none.
        """
        teach_others()
        way = self.way(net, ref, known=toward is not None, moving=moving)
        if way.name == "tape":
            return linearize_by_tape(self.derivatives, net, ref, x, c, t=t, **inputs)
        if way.name == "ride" and toward is not None:
            return linearize_by_ride(net, x, c, toward=toward, moving=moving, t=t, **inputs)
        return linearize_by_passes(self.derivatives, net, ref, x, c, moving=moving, t=t, **inputs)

    def way(self, net: Net, ref: Frozen, *, known: bool, moving: Moving | None = None) -> Way:
        """Which of the three ways is taken.

        net, ref: the network in training and theta^-, as `__call__` takes them.
        known: whether the direction is known before the pass.
        moving: the rows whose derivative is wanted; None: all.
        """
        if ref.module is not unwrap(net):
            return Way("pass", "theta^- has weights of its own")
        if known:
            return Way("ride", "the direction is known before the pass")
        if moving is not None:
            return Way("pass", "the direction is known after the pass, and some rows need no derivative")
        if any(_checkpoints(part) for part in ref.module.modules()):
            return Way("pass", "checkpointing lets the activations go")
        return Way("tape", "the direction is known after the pass")

    def derivatives(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
        """The derivative of each of ref's heads along w, by one dual pass."""
        return tuple(tangent_or_zeros(head) for head in dual_pass(ref, x, c, w, t=t, **inputs))


def _checkpoints(part: nn.Module) -> bool:
    """Whether a part of a network says that it lets activations go: as diffusers, as timm, as torch's wrapper."""
    return (
        getattr(part, "gradient_checkpointing", False)
        or getattr(part, "grad_checkpointing", False)
        or hasattr(part, "checkpoint_fn")
    )


Slope = Annotated[CentralSlope | DualSlope | JvpSlope, Field(discriminator="kind", json_schema_extra=CHANGES)]


def slope_of(objective: Objective) -> Slope | None:
    """The slope that an objective's loss takes; None where the loss has no du/dt."""
    return cast("Slope | None", objective.needs.slope)
