"""The derivative of a net's heads in one of its inputs, with gradients through it: for losses that hold it (TVM).

    heads, rates = rate(net, x_t, c, of="r", t=t, r=r)  # both with gradients, through any distributed wrapper

A slope (`dumo.flow.slope`) gives a target, which is held still, so its tangent is recorded by nobody. Here the tangent
is part of the loss, and its own derivative in the weights is wanted: forward-mode inside, reverse-mode around it.

There is no rate by `torch.func.jvp`: reverse-mode around it is silently wrong through `F.layer_norm` (torch 2.13,
pytorch #196700). Nor would fused attention have it, whose kernels can be differentiated once.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from dumo.autodiff import dual
from dumo.autodiff import rule as rule  # without which a Dual can do nothing
from dumo.autodiff.dual import pair, primal
from dumo.flow import slope
from dumo.types import Cond, Heads, Net, Sample, Spec, Time


class CentralRate(Spec):
    """Central difference, at s - h and s + h: three passes with gradients. Needs fp32, as the slope of this name."""

    kind: Literal["central"] = "central"
    h: float = Field(default=0.005, gt=0, le=0.1)  # as that slope's

    def __call__(self, net: Net, x: Sample, c: Cond, *, of: str, **inputs: Time) -> tuple[Heads, Heads]:
        """Heads, and their derivative in the input of this name. Raises UserError below fp32."""
        self.check(slope.precision_of(x))
        behind, here, ahead = (net(x, c, **inputs | {of: inputs[of] + d}) for d in (-self.h, 0, self.h))
        return here, tuple((b - a) / (2 * self.h) for a, b in zip(behind, ahead, strict=True))

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Raise UserError where the difference would not be a derivative."""
        slope.check_difference("rate", self.h, precision, time_scale)


class DualRate(Spec):
    """Exact, by dual numbers whose tangents are recorded: one pass, about as dear as two, and so is its backward."""

    kind: Literal["dual"] = "dual"

    def __call__(self, net: Net, x: Sample, c: Cond, *, of: str, **inputs: Time) -> tuple[Heads, Heads]:
        """Heads, and their derivative in the input of this name; zero for a head that it does not reach."""
        s = inputs[of]
        with dual.recorded():
            heads = net(x, c, **inputs | {of: pair(s, torch.ones_like(s))})
        return tuple(primal(head) for head in heads), tuple(slope.rate_of(head) for head in heads)

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Nothing to refuse: exact to rounding in any precision, at any scale."""


Rate = Annotated[CentralRate | DualRate, Field(discriminator="kind")]
