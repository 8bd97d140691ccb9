"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): the mean velocity between two times.

The mean velocity u(x_t, t, r) = (x_t - x_r) / (t - r) satisfies (t - r) u = x_t - x_r. At constant r

    u + (t - r) du/dt = v        so        u* = v* - (t - r) du/dt        (its Eq. 6 and 11)

Unlike DuMo, one input gives one output. At r = t this is flow matching, and a row trains either the velocity or a jump.

AYF's Eulerian map distillation (Sabour et al. 2025, arXiv 2506.14603) is this objective with a teacher's velocity as
v*, a factor k of the derivative that increases during training, u* = v* - k (t - r) du/dt, and a normalized gradient
e / (rms(e) + c) of the error e = u - u*: set `grown` and `normalize`.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.objectives.base import (
    STRAIGHT,
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
    Slope,
    Spec,
    Terms,
    Times,
    adaptive_l2,
    clipped_share,
    heads_at_rest,
    lift,
    mean_square,
    mean_velocity,
    normalized_l2,
)


class Line(Spec):
    """A value that changes linearly from `first` to `last` in the first share `over` of the training."""

    first: float = Field(ge=0)
    last: float = Field(ge=0)
    over: float = Field(default=1.0, gt=0, le=1)

    def at(self, progress: float) -> float:
        """Return the value at a progress of the training in [0, 1]."""
        done = min(1.0, progress / self.over)
        return (1 - done) * self.first + done * self.last


class MeanFlow(ObjectiveSpec):
    """Mean velocity from t to r, with a share of the rows at r = t."""

    kind: Literal["meanflow"] = "meanflow"
    times: Times = Pair(of=LogitNormal(mean=-0.4, std=1.0), velocity_ratio=0.75)  # Tab. 4
    drop: float = Field(default=0.1, ge=0, le=1)  # Sec. 4.2
    guide: Guide = Guide(omega=0.2, zeta=0.92, interval=Interval(high=0.75))  # XL/2, Tab. 4; zeta is its kappa
    slope: Slope = DualSlope()  # exact, as Alg. 1's jvp, at half its cost
    power: float = Field(default=1.0, ge=0)  # p of Eq. 22
    floor: float = Field(default=0.01, gt=0)  # c of Eq. 22: their code on ImageNet; 1e-3 in the text and on CIFAR-10
    # c of AYF's normalized gradient, which replaces Eq. 22.
    normalize: float | None = Field(default=None, gt=0, exclude_if=lambda normalize: normalize is None)
    # k of AYF; None means 1.
    grown: Line | None = Field(default=None, exclude_if=lambda grown: grown is None)

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        formulas = STRAIGHT._replace(climbs=True)
        return Needs(
            inputs=("t", "r"),
            heads=("u",),
            formulas=formulas,
            slope=self.slope,
            guide=self.guide,
            scheduled=self.grown is not None,
        )

    @model_validator(mode="after")
    def _require_one_weight(self) -> "MeanFlow":
        if self.power and self.normalize:
            raise ValueError("normalize and power both weight a row by its residual: set power=0, or normalize=null")
        return self

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute its Eq. 9 and 11; with guidance, Eq. 17 to 21; with the metric of Eq. 22."""
        heads = heads_at_rest(net, ref, b) if self.guide.zeta else None
        with torch.no_grad():
            v_c = heads[0] if heads else None
            v_star = self.guide(b, None, lambda b, c: ref(b.x_t, c, t=b.t, r=b.t)[0], resting=v_c)  # Eq. 21
        (u_hat,), along = self.slope(
            net, ref, b.x_t, b.c, t=b.t, r=b.r, direction=v_star, moving=b.moving, resting=heads
        )
        with torch.no_grad():
            (du_dt,) = along(v_star)
            k = self.grown.at(b.progress) if self.grown else 1.0
            u_star = v_star - k * lift(b.t - b.r, b.x_t) * du_dt  # Eq. 11
        error = u_hat - u_star
        # Eq. 22, or AYF's normalized gradient.
        loss = normalized_l2(error, self.normalize) if self.normalize else adaptive_l2(error, self.power, self.floor)
        return Terms(loss, {"u": mean_square(error)}, {"clipped_share": clipped_share(error)})

    def readings(self, net: Net) -> Readings:
        """Return the velocity and jumps of one head with two times (Eq. 12)."""
        return mean_velocity(net, times=self.times)
