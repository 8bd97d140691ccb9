"""alpha-Flow (Zhang et al. 2025, arXiv 2510.20771): from flow matching to MeanFlow, by a step that shrinks in training.

A step from t to r follows the velocity v* for a fraction alpha, to a time l, and then jumps with the network's mean
velocity u_l = u(x_l, l, r):

    l = t - alpha (t - r),        x_l = x_t - (t - l) v*                                    (1)
    (t - r) u = (t - l) v* + (l - r) u_l        so        u* = alpha v* + (1 - alpha) u_l   (2)
    u* = v* - (t - r) du/dt                               if alpha = 0                      (3)  (MeanFlow, Eq. 11)

At alpha = 1, u* = v*, also for r < t: trajectory flow matching. As alpha tends to 0, so does the residual u - u* of
(2). The loss therefore divides it by alpha, which gives a velocity that tends to the residual of (3):

    (u - u*) / alpha = u - v* + (l - r) (u - u_l) / (t - l)                                 (4)
    c / alpha^2      instead of the c of the adaptive weight, for the gradient of the authors    (5)

Unlike DuMo, there is one head with two times and a schedule. alpha depends only on the progress of the training, which
is equal on all ranks, so it may decide which passes are made.
"""

from math import log, tanh
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dumo.objectives.base import (
    DualSlope,
    Frozen,
    Guide,
    Interval,
    LogitNormal,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Pair,
    Readings,
    Sample,
    Slope,
    Terms,
    Times,
    adaptive_l2,
    clipped_share,
    earlier_mean_velocity,
    heads_at_rest,
    lift,
    mean_square,
    mean_velocity,
    require_precise_passes,
    rows_at_rest,
)
from dumo.runtime.limits import require_order
from dumo.types import Array


class AlphaFlow(ObjectiveSpec):
    """Mean velocity from t to r, with a share of rows at r = t. Defaults: XL/2 of its `experiments-alphaflow.yaml`."""

    gamma: ClassVar[float] = 25.0  # slope of the sigmoid of alpha
    snap: ClassVar[float] = 0.005  # alpha is rounded to 0 or 1 within this distance: clamp_value
    clip: ClassVar[float] = 4.0  # bound of u* if alpha > 0 and r < t: clamp_utgt
    floor: ClassVar[float] = 1e-3  # c of the adaptive weight: adaptive_loss_weight_eps
    kind: Literal["alpha_flow"] = "alpha_flow"
    times: Times = Pair(of=LogitNormal(mean=-0.4), flow=LogitNormal(mean=-0.4), velocity_ratio=0.5)
    drop: float = Field(default=0.1, ge=0, le=1)  # label_dropout
    guide: Guide = Guide(omega=0.2, zeta=0.92, interval=Interval(high=0.75))  # cfg_params; zeta is its kappa
    slope: Slope = DualSlope()  # if alpha = 0: `_compute_mean_velocity_c`
    # alpha decreases from 1 to 0 between these shares of the training: from 600k to 1M of 1.2M steps.
    begin: float = Field(default=0.5, ge=0, le=1)
    end: float = Field(default=5 / 6, ge=0, le=1)

    @property
    def gain(self) -> float:
        """The largest factor by which (4) amplifies the network's rounding error."""
        return 1 / self.snap

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        return Needs(
            inputs=("t", "r"),
            heads=("u",),
            slope=self.slope,
            guide=self.guide,
            scheduled=True,
            amplifies=self.gain,
            phases=self.phases,
        )

    @property
    def phases(self) -> tuple[tuple[float, float], ...]:
        """A progress in each phase of equal cost (alpha = 1, between, alpha = 0), and the phase's share."""
        middle = (self.begin + self.end) / 2
        width = self.end - self.begin
        half = min(width / 2, width / self.gamma * log(1 / self.snap - 1))
        phases = ((0.0, middle - half), (middle, 2 * half), (1.0, 1 - middle - half))
        return tuple((progress, share) for progress, share in phases if share > 0)

    @model_validator(mode="after")
    def _require_order(self) -> "AlphaFlow":
        require_order(begin=self.begin, end=self.end)
        return self

    def alpha(self, progress: float) -> float:
        """Return 1 - sigmoid between `begin` and `end`, rounded to 0 and 1 near them (`get_ratio`)."""
        if progress < self.begin:
            return 1.0
        # With begin = end = 0, this is MeanFlow from the first step.
        if progress >= self.end:
            return 0.0
        middle = (self.begin + self.end) / 2
        width = self.end - self.begin
        # 1 - sigmoid, without overflow.
        alpha = 0.5 - 0.5 * tanh(self.gamma * (progress - middle) / width / 2)
        if alpha < self.snap:
            return 0.0
        if alpha > 1 - self.snap:
            return 1.0
        return alpha

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return a loss with the gradient of `AlphaFlowLoss.forward` for each row.

        Raises UserError if the precision of the passes is too low for the gain.
        """
        require_precise_passes(b, self.gain, self.kind)
        alpha = self.alpha(b.progress)
        has_step = b.r < b.t
        floor = torch.full_like(b.t, self.floor)
        if alpha > 0:
            (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
            i = rows_at_rest(net, ref, b) if self.guide.zeta else None
            v_star = self._v_star(ref, b, None if i is None else u_hat[i])
            residual = (u_hat.detach() - self._u_star(ref, b, v_star, alpha)) / alpha  # (4)
            u_star = torch.where(lift(has_step, u_hat), u_hat.detach() - residual, v_star)
            floor = floor.where(~has_step, self.floor / alpha**2)  # (5)
        else:
            heads = heads_at_rest(net, ref, b) if self.guide.zeta else None
            v_star = self._v_star(ref, b, heads[0] if heads else None)
            (u_hat,), along = self.slope(
                net, ref, b.x_t, b.c, t=b.t, r=b.r, direction=v_star, moving=b.moving, resting=heads
            )
            (du_dt,) = along(v_star)
            u_star = v_star - lift(b.t - b.r, b.x_t) * du_dt  # (3)
        error = u_hat - u_star
        loss = adaptive_l2(error, 1.0, floor, mean=True)
        return Terms(loss, {"u": mean_square(error)}, {"clipped_share": clipped_share(error)})

    @torch.no_grad()
    def _v_star(self, ref: Frozen, b: NoisyBatch, resting: Array | None) -> Sample:
        """Return the guided velocity at x_t. `resting` is V(c) of the rows with r = t, if it is computed already."""
        return self.guide(b, None, lambda b, c: ref(b.x_t, c, t=b.t, r=b.t)[0], resting=resting)

    def _u_star(self, ref: Frozen, b: NoisyBatch, v_star: Sample, alpha: float) -> Sample:
        """Compute u* of (2), clipped. At alpha = 1 no pass is needed."""
        u_star = alpha * v_star
        if alpha < 1:
            u_l = earlier_mean_velocity(ref, b, v_star, alpha * (b.t - b.r))  # (1)
            u_star = u_star + (1 - alpha) * u_l
        return u_star.clamp(-self.clip, self.clip)

    def readings(self, net: Net) -> Readings:
        """Read the one head as the mean velocity from t to r."""
        return mean_velocity(net, times=self.times)
