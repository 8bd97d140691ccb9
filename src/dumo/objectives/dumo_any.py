"""DuMo-Any (ours): DuMo with a flow map to any time r, instead of to the data only.

DuMo's u jumps from t to the data. Here u also gets the end r of the jump: it is the mean velocity between both times,
u(x_t, t, r) = (x_t - x_r) / (t - r). At constant r, (t - r) u = x_t - x_r, so

    u + (t - r) du/dt = v        so        u* = v* - (t - r) du/dt        (MeanFlow, Eq. 6 and 11)

At r = 0 this is DuMo's u.

In dumo's own networks only the output layer of u depends on r, not the trunk and the v head. A pretrained model
(`net.kind=diffusers`) gets r in its time embedding, and a user's network as an argument, so all layers may depend on r.
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

FLOOR = 0.01  # c of MeanFlow's Eq. 22, as in its code for ImageNet


class DuMoAny(ObjectiveSpec):
    """Velocity and mean velocity, both trained on every row."""

    kind: Literal["dumo_any"] = "dumo_any"
    times: Times = Jumps()  # ours
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    beta: float = Field(default=0.7, ge=0, le=1)  # weight of the velocity, as DuMo
    guide: Guide = Guide(zeta=0.55)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo
    power: float = Field(default=0.0, ge=0)  # p of MeanFlow's Eq. 22, for u; 0 is the mean square, as DuMo

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        return Needs(heads=("v", "u"), own={"u": ("r",)}, slope=self.slope, guide=self.guide, formulas=STRAIGHT)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute lines 7 to 12 of DuMo's Alg. 1, with MeanFlow's target and metric for u."""
        direction = self.guide.known_target(b)
        (v_hat, u_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, direction=direction, moving=b.moving)
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
        """Return the velocity v, and jumps from t to any r with u (MeanFlow, Eq. 12)."""
        return mean_velocity(net, head=1, velocity_head=0)
