"""SoFlow (Luo et al. 2025, arXiv 2512.15657): jumps to r from t and from l < t must agree.

A jump f of the exact flow returns x_r from any t, so f is constant along a trajectory. Let l lie between r and t, and
let x_l be on the trajectory through x_t, up to O((t - l)^2):

    f(x_t, t, r) = x_t - (t - r) u(x_t, t, r)                                                 (1)
    x_l = x_t - (t - l) v*,        u_l = u(x_l, l, r)                                         (2)
    (t - r) u = (t - l) v* + (l - r) u_l                                                      (3)
    u* = v* - (l - r) (u - u_l) / (t - l)                                                     (4)

(4) is MeanFlow's target with the secant (u - u_l) / (t - l) for du/dt, so it needs no JVP. During training l moves from
r towards t. At r = t the target is v*, as in flow matching.

Unlike DuMo, there is one head with two times. On rows with r < t the authors' loss is u times the detached residual
u - u*, with half the gradient of the squared residual. Ours is the square, so those rows have weight 1/2.

File names below refer to the authors' code.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    Cond,
    Frozen,
    Guide,
    LogitNormal,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Pair,
    Readings,
    Sample,
    Terms,
    Times,
    adaptive_l2,
    clipped_share,
    earlier_mean_velocity,
    lift,
    mean_square,
    mean_velocity,
    require_precise_passes,
    rows_at_rest,
)


class SoFlow(ObjectiveSpec):
    """Mean velocity from t to r by a secant, with a share of the rows at r = t.

    The defaults are from the authors' `imagenet.yaml`.
    """

    min_step: ClassVar[float] = 1e-4  # the smallest t - l (`train.py`)
    fade_start: ClassVar[float] = 0.8  # the time t from which V(null) is blended into v_t (cfg_decay_time)
    fade_rate: ClassVar[float] = 0.025  # k in the formula of `_velocity` (`models.py`)
    kind: Literal["soflow"] = "soflow"
    times: Times = Pair(
        of=LogitNormal(mean=0.2, std=0.8),
        to=LogitNormal(mean=-1.0, std=0.8),
        flow=LogitNormal(mean=-0.2, std=1.0),
        velocity_ratio=0.75,
    )
    drop: float = Field(default=0.1, ge=0, le=1)  # cfg_drop_rate
    guide: Guide = Guide(omega=0.75, zeta=0.75)  # m w and 1 - m, with the authors' m = 0.25, w = 3
    first: float = Field(default=0.1, gt=0, le=1)  # (t - l) / (t - r) at the start of training (l_init_ratio)
    last: float = Field(default=0.002, gt=0, le=1)  # (t - l) / (t - r) at the end of training (l_end_ratio)
    power: float = Field(default=1.0, ge=0)  # p of the metric `adaptive_l2`
    floor: float = Field(default=0.01, gt=0)  # c of the metric (eps)

    @property
    def gain(self) -> float:
        """The largest factor by which (4) amplifies the network's rounding error."""
        return 1 / min(self.first, self.last)

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        scheduled = self.first != self.last
        return Needs(inputs=("t", "r"), heads=("u",), guide=self.guide, scheduled=scheduled, amplifies=self.gain)

    def ratio(self, progress: float) -> float:
        """Return (t - l) / (t - r) at a progress of the training: exponential from `first` to `last`.

        The authors' `get_middle_time`.
        """
        return self.first * (self.last / self.first) ** progress

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the weighted metric of u - u* for each row: `models.py`, get_velocity_loss and get_consistency_loss.

        Raises UserError if the precision of the passes is too low for a step as short as `last`.
        """
        require_precise_passes(b, self.gain, self.kind)
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        with torch.no_grad():
            i = rows_at_rest(net, ref, b) if self.guide.zeta else None
            v_c = None if i is None else u_hat[i]
            v_star = self.guide(b, None, lambda b, c: self._velocity(ref, b, c), resting=v_c)
            t_minus_l = (self.ratio(b.progress) * (b.t - b.r)).clamp(min=self.min_step)
            l_minus_r = (b.t - t_minus_l - b.r).clamp(min=0)  # 0 at r = t, so that u* = v*
            u_l = earlier_mean_velocity(ref, b, v_star, t_minus_l)  # (2)
            secant = (u_hat - u_l) / lift(t_minus_l, b.x_t)
            u_star = v_star - lift(l_minus_r, b.x_t) * secant  # (4)
        error = u_hat - u_star
        row_weight = torch.where(b.r < b.t, 0.5, 1.0)
        loss = row_weight * adaptive_l2(error, self.power, self.floor, mean=True)
        return Terms(loss, {"u": mean_square(error)}, {"clipped_share": clipped_share(error)})

    def _velocity(self, ref: Frozen, b: NoisyBatch, c: Cond) -> Sample:
        """Return the velocity V(c) for guidance. V(null) is blended into v_t from t = `fade_start` to 1 (`models.py`):

            v_t + share (V(null) - v_t),    share = 1 - exp(-k s / (1 - s)),    s = (1 - t) / (1 - fade_start)

        The share is 1 up to `fade_start`, and 0 at t = 1.
        """
        (v,) = ref(b.x_t, c, t=b.t, r=b.t)
        if c is not b.null:
            return v
        s = ((1 - b.t) / (1 - self.fade_start)).clamp(0, 1)
        faded_share = -torch.expm1(-self.fade_rate * s / (1 - s).clamp(min=1e-12))
        share = torch.where(s < 1, faded_share, 1)
        return b.v_t + lift(share, b.x_t) * (v - b.v_t)

    def readings(self, net: Net) -> Readings:
        """Return the readings of the mean velocity from t to r."""
        return mean_velocity(net, times=self.times)
