"""Methods for computing the total derivative du/dt along the flow, selected by `objective.slope`.

Along a trajectory with velocity w = dx_t/dt, the derivative of a head u is

    du/dt = (d/ds) u(x_t + s w, t + s)  at s = 0.

A loss may need the network's heads at a point before it knows w. A slope therefore linearizes the network at that
point, as `torch.func.linearize` does: it returns the heads, and a function for the derivatives.

    heads, along = slope(net, ref, x_t, c, t=t, r=r)  # one pass of net, with gradients
    dv_dt, du_dt = along(w)                           # of ref, without gradients; r and other inputs are constant

1. A loss calls its slope. It passes `direction=w` if w is known before the pass, and the rows that need a derivative as
   `moving`; the derivatives of the remaining rows are zero.
2. A slope that needs fp32 checks the current precision (`BaseSlope.check`).
3. A function of `dumo.flow.linearize` makes the training pass and returns `(heads, along)`. Autograd records the heads
   and not the derivatives.
4. The loss calls `along(w)`.

`Slope` is the union of the specs:

    central  two passes at t - h and t + h; needs fp32
    jvp      one pass with `torch.func.jvp`; exact
    dual     dual numbers, in the training pass if possible (`DualSlope.strategy`); exact
"""

from abc import ABC, abstractmethod
from math import floor
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.autodiff.dual import accept_duals
from dumo.flow.linearize import Along as Along
from dumo.flow.linearize import (
    Moving,
    dual_pass,
    linearize_deferred,
    linearize_fused,
    linearize_separate,
    tangent_or_zeros,
)
from dumo.flow.precision import precision_of
from dumo.types import CHANGES, Cond, Frozen, Heads, Net, Objective, Sample, Spec, Time, UserError, unwrap

# The largest h * time_scale of a central difference (our choice). Its error is well below 1 % there, and 3 % at ten
# times that (measured).
_MAX_SCALED_STEP = 0.05
# The largest relative error of a slope that `flow.derivative` and `run.examination` accept (our choice). An exact one
# has 1 to 2 % under bf16, a broken one 40 % and more (measured).
MAX_SLOPE_ERROR = 0.05


class BaseSlope(Spec, ABC):
    """The base class of slopes. Subclasses implement `derivatives`."""

    def __call__(
        self,
        net: Net,
        ref: Frozen,
        x: Sample,
        c: Cond,
        *,
        t: Time,
        direction: Sample | None = None,
        moving: Moving | None = None,
        resting: Heads | None = None,
        **inputs: Time,
    ) -> tuple[Heads, Along]:
        """Return the heads of one pass of net, with gradients, and `along`, which returns the derivatives of ref.

        net: the network in training.
        ref: theta^-, the network to differentiate; it may have the same weights.
        x, c, t, inputs: the inputs of the pass, of b rows.
        direction: w, if it is known before the pass; `along` then accepts only this w.
        moving: the rows that need a derivative; None means all.
        resting: the heads of the other rows, if their pass is made already (`linearize.heads_at_rest`).

        Raises UserError if the current precision is too low for this slope.
        """
        self.check(precision_of(x))
        return linearize_separate(self.derivatives, net, ref, x, c, moving=moving, resting=resting, t=t, **inputs)

    @abstractmethod
    def derivatives(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
        """Compute the derivative of each head of ref along dx/dt = w (b, ...), in separate passes."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Raise UserError if the slope is not accurate. An exact slope is accurate in any precision.

        precision: a name that `precision_of` returns.
        time_scale: the factor by which the network multiplies t.
        """


class CentralSlope(BaseSlope):
    """Central difference of two passes of ref at t - h and t + h, without a JVP (paper, Sec. 3.3; h as UCGM).

    t may leave [0, 1] by h, because clamping would make the difference one-sided at t = 1, the time of one-step
    sampling. Needs fp32: under bf16, rounding exceeds the difference (measured errors: 42 to 83 %, and 7 % with TF32).
    """

    kind: Literal["central"] = "central"
    h: float = Field(default=0.005, gt=0, le=0.1)

    def derivatives(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
        """Compute the derivative of each head of ref along w, by two passes."""
        behind = ref(x - self.h * w, c, t=t - self.h, **inputs)
        ahead = ref(x + self.h * w, c, t=t + self.h, **inputs)
        return tuple((b - a) / (2 * self.h) for a, b in zip(behind, ahead, strict=True))

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Raise UserError below fp32, or if h is too long a step on the network's time scale."""
        if precision != "fp32":
            raise UserError(
                f"slope 'central' needs precision fp32, not {precision}, because rounding exceeds the difference at "
                f"h = {self.h}: use precision fp32, or slope 'dual'"
            )
        if self.h * time_scale > _MAX_SCALED_STEP:
            max_h = floor(1e6 * _MAX_SCALED_STEP / time_scale) / 1e6
            raise UserError(
                f"slope 'central' with h = {self.h} and time_scale = {time_scale} is not accurate, because "
                f"h * time_scale is above {_MAX_SCALED_STEP}: use h <= {max_h:g}, a smaller time_scale or slope 'dual'"
            )


class JvpSlope(BaseSlope):
    """Exact, by a separate pass of ref in forward mode, with the math kernel of attention."""

    kind: Literal["jvp"] = "jvp"

    def derivatives(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
        """Compute the derivative of each head of ref along w, by one pass in forward mode."""

        def heads_at(x: Sample, t: Time) -> Heads:
            return ref(x, c, t=t, **inputs)

        # The fused kernels have no forward derivative.
        with sdpa_kernel(SDPBackend.MATH):
            heads_and_tangents = torch.func.jvp(heads_at, (x, t), (w, torch.ones_like(t)))
        # The type has a third result, which `has_aux` would return.
        _, tangents = cast("tuple[Heads, Heads]", heads_and_tangents)
        return tangents


class DualStrategy(NamedTuple):
    """When a `DualSlope` computes the derivatives, and the reason for reports."""

    name: Literal["deferred", "fused", "separate"]
    reason: str

    @property
    def text(self) -> str:
        """Describe the strategy, for reports."""
        return {
            "deferred": "after the training pass, from its activations",
            "fused": "in the training pass",
            "separate": "in a separate pass",
        }[self.name]


class DualSlope(BaseSlope):
    """Exact, by dual numbers (`dumo.autodiff.dual`, our implementation), in the training pass if possible.

    `strategy` chooses one of three strategies:

    - fused: the direction is known before the pass, which computes the derivatives as well. If only some rows need a
      derivative, the remaining rows get a second pass.
    - deferred: the direction is known after the pass. The derivatives are computed from the activations, which are
      kept for the backward pass anyway.
    - separate: an extra dual pass without gradients. It costs as much as the two passes of a central difference. It is
      used if the activations or weights are not available (a moving average as theta^-, checkpointing, sharded weights
      that FSDP2 frees after the pass), and if the direction is known after the pass and only some rows need a
      derivative, because a pass of these rows is cheaper than a deferred evaluation of all.
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
        direction: Sample | None = None,
        moving: Moving | None = None,
        resting: Heads | None = None,
        **inputs: Time,
    ) -> tuple[Heads, Along]:
        """Return the heads of one pass of net, and `along`, as `BaseSlope.__call__`, in any precision."""
        accept_duals()
        strategy = self.strategy(net, ref, known=direction is not None, moving=moving)
        if strategy.name == "deferred":
            return linearize_deferred(self.derivatives, net, ref, x, c, t=t, **inputs)
        if strategy.name == "fused" and direction is not None:
            return linearize_fused(net, x, c, direction=direction, moving=moving, resting=resting, t=t, **inputs)
        return linearize_separate(self.derivatives, net, ref, x, c, moving=moving, resting=resting, t=t, **inputs)

    def strategy(self, net: Net, ref: Frozen, *, known: bool, moving: Moving | None = None) -> DualStrategy:
        """Choose a strategy.

        net, ref: the network in training and theta^-, as in `__call__`.
        known: whether the direction is known before the pass.
        moving: the rows that need a derivative; None means all.
        """
        if ref.module is not unwrap(net):
            return DualStrategy("separate", "theta^- has other weights")
        if known:
            return DualStrategy("fused", "the direction is known before the pass")
        if moving is not None:
            return DualStrategy("separate", "the direction is known after the pass, and some rows need no derivative")
        if any(_uses_checkpointing(module) for module in ref.module.modules()):
            return DualStrategy("separate", "checkpointing frees the activations")
        return DualStrategy("deferred", "the direction is known after the pass")

    def derivatives(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
        """Compute the derivative of each head of ref along w, by one dual pass."""
        return tuple(tangent_or_zeros(head) for head in dual_pass(ref, x, c, w, t=t, **inputs))


def _uses_checkpointing(module: nn.Module) -> bool:
    """Whether a module uses activation checkpointing, in the conventions of diffusers, timm and torch."""
    return (
        getattr(module, "gradient_checkpointing", False)
        or getattr(module, "grad_checkpointing", False)
        or hasattr(module, "checkpoint_fn")
    )


Slope = Annotated[CentralSlope | DualSlope | JvpSlope, Field(discriminator="kind", json_schema_extra=CHANGES)]


def slope_of(objective: Objective) -> Slope | None:
    """Return the slope of an objective, or None if its loss has no du/dt."""
    return cast("Slope | None", objective.needs.slope)
