"""d/dt of a net's heads along the flow, in a direction that is known only after the pass.

Along a trajectory x_t moves with velocity w while t moves with 1, so the total derivative of a head u is

    du/dt = (d/ds) u(x_t + s w, t + s)  at s = 0.

Every slope linearizes the net at a point, as `torch.func.linearize` does: the value now, the derivative later.

    heads, along = slope(net, ref, x_t, c, t=t, r=r)     # one pass of net, with gradients
    dv_dt, du_dt = along(w)                              # of ref, without; r and all other inputs rest

Slopes differ only inside: how many passes `along` makes, and how exact it is.
"""

from collections.abc import Callable
from math import floor
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.types import Cond, Frozen, Heads, Net, Sample, Spec, Time, UserError

Along = Callable[[Sample], Heads]

MAX_STEP = 0.05  # ours: of h * time_scale; the difference is well within 1 % there, 3 % off at ten times it (measured)


class Central(Spec):
    """Central difference, two passes of ref at t - h and t + h: no JVP (paper, Sec. 3.3; h as UCGM).

    Both ends stay as they fall, so t may leave [0, 1] by h: clamping would make the difference one-sided at t = 1,
    where one-step sampling runs. Needs fp32: under bf16 rounding outweighs the difference (measured: 42 to 83 % wrong).
    """

    kind: Literal["central"] = "central"
    h: float = Field(default=0.005, gt=0, le=0.1)

    def __call__(self, net: Net, ref: Frozen, x: Sample, c: Cond, *, t: Time, **rest: Time) -> tuple[Heads, Along]:
        """One pass of net now, two of ref in `along`. Raises UserError below fp32."""
        self.check(_precision(x))
        heads = net(x, c, t=t, **rest)

        @torch.no_grad()
        def along(w: Sample) -> Heads:
            behind = ref(x - self.h * w, c, t=t - self.h, **rest)
            ahead = ref(x + self.h * w, c, t=t + self.h, **rest)
            return tuple((b - a) / (2 * self.h) for a, b in zip(behind, ahead, strict=True))

        return heads, along

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Raise UserError where the difference would not be a derivative."""
        if precision != "fp32":
            raise UserError(
                f"slope 'central' needs precision fp32, not {precision}: at h = {self.h} rounding outweighs the "
                "difference (42 to 83 % wrong under bf16). Use precision fp32, or slope 'jvp'"
            )
        if self.h * time_scale > MAX_STEP:
            most = floor(1e6 * MAX_STEP / time_scale) / 1e6
            raise UserError(
                f"slope 'central' with h = {self.h} on a net with time_scale = {time_scale}: h * time_scale is above "
                f"{MAX_STEP}, and the difference is no longer a derivative. Use h <= {most:g}, a smaller time_scale or "
                "slope 'jvp'"
            )


class Jvp(Spec):
    """Exact, by forward-mode differentiation of ref: a pass of its own, with the math kernel of attention."""

    kind: Literal["jvp"] = "jvp"

    def __call__(self, net: Net, ref: Frozen, x: Sample, c: Cond, *, t: Time, **rest: Time) -> tuple[Heads, Along]:
        """One pass of net now, one differentiated pass of ref in `along`."""
        heads = net(x, c, t=t, **rest)

        def along(w: Sample) -> Heads:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
                _, slopes = _jvp(lambda x, t: ref(x, c, t=t, **rest), (x, t), (w, torch.ones_like(t)))
            return slopes

        return heads, along

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Nothing to refuse: exact to rounding in any precision, at any scale."""


Slope = Annotated[Central | Jvp, Field(discriminator="kind")]


def _precision(x: Sample) -> str:
    """What a pass on x computes in; fp64 is as good as fp32."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return f"{torch.get_autocast_dtype(kind)} autocast"
    return "fp32" if x.dtype in (torch.float32, torch.float64) else str(x.dtype)


def _jvp(
    f: Callable[[Sample, Time], Heads], at: tuple[Sample, Time], along: tuple[Sample, Time]
) -> tuple[Heads, Heads]:
    """`torch.func.jvp` without its third result, which it is typed as if it might return."""
    value, slope = torch.func.jvp(f, at, along)  # pyright: ignore[reportAssignmentType]
    return value, slope
