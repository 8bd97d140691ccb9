"""DuMo-Any (ours): DuMo whose flow map ends at any time r, where that of the paper ends at the data.

DuMo's u jumps from t to the data alone. Here u also gets the time r at which the jump ends: it is the mean
velocity between both times, u(x_t, t, r) = (x_t - x_r) / (t - r). With r at rest, (t - r) u = x_t - x_r, so

    u + (t - r) du/dt = v        so        u* = v* - (t - r) du/dt        (MeanFlow, Eq. 6 and 11)

At r = 0 this is DuMo's u.

On dumo's own nets only the output layer of u gets r: the trunk and the v head never see it. A pretrained model
(`net.kind=diffusers`) gets r in its embedding of time, a network of a user's as an argument, so there all may see r.
"""

from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    STRAIGHT,
    CentralSlope,
    Frozen,
    Guide,
    Jumps,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Slope,
    Terms,
    Times,
    adaptive_l2,
    clipped_share,
    lift,
    mean_square,
    mean_velocity,
)

FLOOR = 0.01  # c of MeanFlow's Eq. 22, as its code has it on ImageNet


class DuMoAny(ObjectiveSpec):
    """Velocity and mean velocity, both regressed on every sample."""

    kind: Literal["dumo_any"] = "dumo_any"
    times: Times = Jumps()  # ours
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    beta: float = Field(default=0.7, ge=0, le=1)  # weight of the velocity, as DuMo
    guide: Guide = Guide(zeta=0.55)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo
    power: float = Field(default=0.0, ge=0)  # p of MeanFlow's Eq. 22, for u; 0: the mean square, as DuMo

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and what else the loss needs."""
        return Needs(heads=("v", "u"), own={"u": ("r",)}, slope=self.slope, guide=self.guide, formulas=STRAIGHT)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Lines 7 to 12 of DuMo's Alg. 1, with MeanFlow's target and metric for u."""
        toward = self.guide.known_target(b)
        (v_hat, u_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, toward=toward, moving=b.moving)
        with torch.no_grad():
            v_star = self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t, r=b.r)[0])  # lines 8 and 9
            _, du_dt = along(v_star)
            u_star = v_star - lift(b.t - b.r, b.x_t) * du_dt  # Eq. 11
        u_error = u_hat - u_star
        v_loss = mean_square(v_hat - v_star)
        u_loss = adaptive_l2(u_error, self.power, FLOOR) if self.power else mean_square(u_error)  # Eq. 22
        loss = self.beta * v_loss + (1 - self.beta) * u_loss  # line 12
        return Terms(loss, {"v": v_loss, "u": mean_square(u_error)}, {"clipped_share": clipped_share(u_error)})

    def readings(self, net: Net) -> Readings:
        """The v head is the slope of the path; the u head jumps from t to any r (MeanFlow, Eq. 12)."""
        return mean_velocity(net, head=1, velocity_head=0)
