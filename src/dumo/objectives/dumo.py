"""DuMo (Duality Models, arXiv 2602.17682, Sec. 3 and Alg. 1): one input, two outputs.

One pass of F(x_t, t, c) gives both the velocity v = dx_t/dt and the flow map u = (x_t - x_0) / t.
Differentiating t u = x_t - x_0 along the flow gives the identity that trains u without a teacher:

    u + t du/dt = v        so        u* = v* - t du/dt
"""

from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    STRAIGHT,
    Beta,
    CentralSlope,
    Frozen,
    Guide,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Slope,
    Terms,
    Times,
    clipped_share,
    head_gap,
    lift,
    mean_square,
    velocity_and_jump,
)


class DuMo(ObjectiveSpec):
    """Velocity and flow map, both trained on every row."""

    kind: Literal["dumo"] = "dumo"
    times: Times = Beta(a=2.4, b=2.4)  # line 3; (theta_1, theta_2) of Tab. 3
    drop: float = Field(default=0.1, ge=0, le=1)  # as UCGM; the paper does not specify it
    beta: float = Field(default=0.7, ge=0, le=1)  # weight of the velocity, Eq. 9 and Tab. 3
    guide: Guide = Guide(zeta=0.55)  # line 9 and Tab. 3
    # Sec. 3.3; h as UCGM. `dumo.Flow` takes an exact slope instead if none is given.
    slope: Slope = CentralSlope(h=0.005)

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        return Needs(inputs=("t",), heads=("v", "u"), slope=self.slope, guide=self.guide, formulas=STRAIGHT)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute lines 7 to 12 of Alg. 1."""
        (v_hat, u_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t, direction=self.guide.known_target(b))  # line 7
        with torch.no_grad():
            v_star = self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t)[0])  # lines 8 and 9
            _, du_dt = along(v_star)
            u_star = v_star - lift(b.t, b.x_t) * du_dt  # line 10
        v_error = v_hat - v_star
        u_error = u_hat - u_star
        v_loss = mean_square(v_error)
        u_loss = mean_square(u_error)
        loss = self.beta * v_loss + (1 - self.beta) * u_loss  # line 12
        notes = {"clipped_share": clipped_share(u_error), "head_gap": head_gap(v_error, u_error)}
        return Terms(loss, {"v": v_loss, "u": u_loss}, notes)

    def readings(self, net: Net) -> Readings:
        """Return the velocity v, and the endpoint x_0 = x_t - t u (Eq. 6)."""
        return velocity_and_jump(net)
