"""SoFlow (Luo et al. 2025, arXiv 2512.15657): the jump from t and the jump from a little earlier land in one place.

The solution f is x_r whatever t, so it does not change along the flow. With l between r and t and x_l on the trajectory
up to O((t - l)^2):

    f(x_t, t, r) = x_t - (t - r) u(x_t, t, r)                                                 (1)
    x_l = x_t - (t - l) v*,        u_l = u(x_l, l, r)                                         (2)
    (t - r) u = (t - l) v* + (l - r) u_l                                                      (3)
    u* = v* - (l - r) (u - u_l) / (t - l)                                                     (4)

(4) is MeanFlow's target with a secant for the derivative, no JVP. In training l goes from near r to near t. At r = t
this is flow matching.

Unlike DuMo: one head of two times. The authors' loss is no square but u times its residual, held still; its gradient,
half of that of a square, is kept on rows with r < t.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from dumo.flow.guide import Guide
from dumo.flow.precision import require_precise_passes
from dumo.flow.reading import mean_velocity
from dumo.flow.residual import adaptive_l2, clipped_share
from dumo.flow.secant import earlier_mean_velocity
from dumo.flow.times import LogitNormal, Pair, Times
from dumo.types import Cond, Frozen, Needs, Net, Noised, Reads, Sample, Spec, Terms, lift, mean_square


class SoFlow(Spec):
    """Mean velocity from t to r by a secant, with a share of the rows at r = t. Defaults: its `imagenet.yaml`."""

    gap: ClassVar[float] = 1e-4  # t - l is at least this: `train.py`
    fade: ClassVar[float] = 0.8  # the time from which V(null) fades into v_t, until t = 1: cfg_decay_time
    decay: ClassVar[float] = 0.025  # how slowly it does: `models.py`
    kind: Literal["soflow"] = "soflow"
    times: Times = Pair(
        of=LogitNormal(mean=0.2, std=0.8),
        to=LogitNormal(mean=-1.0, std=0.8),
        flow=LogitNormal(mean=-0.2, std=1.0),
        velocity_ratio=0.75,
    )
    drop: float = Field(default=0.1, ge=0, le=1)  # cfg_drop_rate
    guide: Guide = Guide(omega=0.75, zeta=0.75)  # m w and 1 - m of m = 0.25, w = 3
    first: float = Field(default=0.1, gt=0, le=1)  # (t - l) / (t - r) at the start: l_init_ratio
    last: float = Field(default=0.002, gt=0, le=1)  # and at the end: l_end_ratio
    power: float = Field(default=1.0, ge=0)  # p
    floor: float = Field(default=0.01, gt=0)  # eps

    @property
    def gain(self) -> float:
        """The factor by which (4) multiplies the rounding of the net, at most."""
        return 1 / min(self.first, self.last)

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        return Needs(inputs=("t", "r"), heads=("u",), guide=self.guide, amplifies=self.gain)

    def ratio(self, progress: float) -> float:
        """(t - l) / (t - r) at a share of the training: exponential from `first` to `last` (`get_middle_time`)."""
        return self.first * (self.last / self.first) ** progress

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """`models.py`, get_velocity_loss and get_consistency_loss. Raises UserError where a short step meets bf16."""
        require_precise_passes(b, self.gain, self.kind)
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        with torch.no_grad():
            v_star = self.guide(b, None, lambda b, c: self._velocity(ref, b, c))
            d = (self.ratio(b.progress) * (b.t - b.r)).clamp(min=self.gap)  # t - l
            u_l = earlier_mean_velocity(ref, b, v_star, d)  # (2)
            du_dt = (u_hat - u_l) / lift(d, b.x_t)
            u_star = v_star - lift((b.t - d - b.r).clamp(min=0), b.x_t) * du_dt  # (4)
        error = u_hat - u_star
        half = torch.where(b.r < b.t, 0.5, 1.0)
        loss = half * adaptive_l2(error, self.power, self.floor, mean=True)
        return Terms(loss, {"u": mean_square(error)}, {"clipped_share": clipped_share(error)})

    def _velocity(self, ref: Frozen, b: Noised, c: Cond) -> Sample:
        """V(c) as it is. V(null) fades into v_t as t goes from `fade` to 1 (`models.py`)."""
        (v,) = ref(b.x_t, c, t=b.t, r=b.t)
        if c is not b.null:
            return v
        s = ((1 - b.t) / (1 - self.fade)).clamp(0, 1)  # 1 until `fade`, 0 at t = 1
        share = torch.where(s < 1, -torch.expm1(-self.decay * s / (1 - s).clamp(min=1e-12)), 1)
        return b.v_t + lift(share, b.x_t) * (v - b.v_t)

    def read(self, net: Net) -> Reads:
        """One head, read at two times."""
        return mean_velocity(net)
