"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): the mean velocity between two times.

The mean velocity u(x_t, t, r) = (x_t - x_r) / (t - r) obeys, with r at rest, (t - r) u = x_t - x_r, so

    u + (t - r) du/dt = v        so        u* = v* - (t - r) du/dt        (its Eq. 6 and 11)

At r = t this is flow matching. One input, one output: rows that train one do not train the other.

AYF's Eulerian map distillation (Sabour et al. 2025, arXiv 2506.14603) is this with a teacher's velocity for v*, a
derivative that grows, u* = v* - k (t - r) du/dt, and a pull e / (rms(e) + c) of the error e = u - u*.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.guide import Guide, Interval
from dumo.flow.reading import mean_velocity
from dumo.flow.residual import adaptive, clipped_share, normalized
from dumo.flow.slope import JvpSlope, Slope
from dumo.flow.times import LogitNormal, Pair, Times
from dumo.flow.weight import Weight, weight_at
from dumo.types import Frozen, Needs, Net, Noised, Reads, Spec, Terms, lift, mean_square


class MeanFlow(Spec):
    """Mean velocity from t to r, with a share of the rows at r = t."""

    kind: Literal["meanflow"] = "meanflow"
    times: Times = Pair(of=LogitNormal(mean=-0.4, std=1.0), velocity_ratio=0.75)  # Tab. 4
    drop: float = Field(default=0.1, ge=0, le=1)  # Sec. 4.2
    guide: Guide = Guide(omega=0.2, zeta=0.92, interval=Interval(high=0.75))  # XL/2, Tab. 4; zeta is its kappa
    slope: Slope = JvpSlope()  # Alg. 1
    power: float = Field(default=1.0, ge=0)  # p of Eq. 22
    floor: float = Field(
        default=0.01, gt=0
    )  # c of Eq. 22, as the authors' code on ImageNet; 1e-3 in the text and on CIFAR-10
    normalize: float | None = Field(
        default=None, gt=0, exclude_if=lambda c: c is None
    )  # c of AYF's pull, not of Eq. 22
    grown: Weight = Field(default=1.0, exclude_if=lambda k: k == 1)  # k of AYF: what counts of the derivative

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        return Needs(inputs=("t", "r"), heads=("u",), slope=self.slope, guide=self.guide, climbs=True)

    @model_validator(mode="after")
    def _unbiased(self) -> "MeanFlow":
        if self.power and self.normalize:
            raise ValueError("normalize and power both weigh a row by its own residual: set power=0, or normalize=null")
        if self.power or self.normalize:
            self.guide.demand_l2("power > 0, as normalize, weighs a row by its own residual", "power=0")
        return self

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Its Eq. 9 and 11; with guidance, Eq. 17 to 21; metric of Eq. 22."""
        with torch.no_grad():
            v_star = self.guide(b, None, lambda b, c: ref(b.x_t, c, t=b.t, r=b.t)[0])  # Eq. 21
        (u_hat,), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, toward=v_star, moving=b.moving)
        with torch.no_grad():
            (du_dt,) = along(v_star)
            k = weight_at(self.grown, b.progress)
            u_star = v_star - k * lift(b.t - b.r, b.x_t) * du_dt  # Eq. 11
        e = u_hat - u_star
        loss = normalized(e, self.normalize) if self.normalize else adaptive(e, self.power, self.floor)  # Eq. 22
        return Terms(loss, {"u": mean_square(e)}, {"clipped_share": clipped_share(e)})

    def read(self, net: Net) -> Reads:
        """One head, read at two times (Eq. 12)."""
        return mean_velocity(net)
