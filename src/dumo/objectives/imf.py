"""Improved MeanFlow (Geng et al. 2025, arXiv 2512.02012): the mean velocity, its derivative along the learned velocity.

MeanFlow's identity holds along the flow with the velocity v(x_t, t), the mean of v_t:

    u + (t - r) du/dt = v,      d/dt along v        so        u* = v* - (t - r) du/dt             (1)

The direction of du/dt is the velocity V of a second head instead of the sample v_t, so the only noise in the target is
that of v*. The guidance scale w and its interval [low, high] are inputs of the network, which a user sets as knobs when
sampling.

    V = V(x_t, c; w'),      w' = w in the interval, else 1                                        (2)
    v* = v_t + (1 - 1 / w') (V - V(x_t, null; 1))                                                 (3)
    v*  converges to  V(null) + w' (E[v_t] - V(null))

Unlike DuMo, u ends at any time r, and sampling uses only u.
"""

from dataclasses import replace
from math import log
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.linearize import merge_rows
from dumo.objectives.base import (
    DualSlope,
    Frozen,
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
    Time,
    Times,
    Uniform,
    adaptive_l2,
    clipped_share,
    dropout,
    heads_at_rest,
    index,
    lift,
    mean_square,
    mean_velocity,
)
from dumo.types import Array


class ImprovedMeanFlow(ObjectiveSpec):
    """Mean velocity from t to r, and velocity on every row, both guided by knobs. Defaults as its code (`imf.py`)."""

    power: ClassVar[float] = 1.0  # p of MeanFlow's Eq. 22, for both heads
    floor: ClassVar[float] = 0.01  # c of MeanFlow's Eq. 22
    kind: Literal["imf"] = "imf"
    times: Times = Pair(of=LogitNormal(mean=-0.4, std=1.0), velocity_ratio=0.5)
    drop: float = Field(default=0.1, ge=0, le=1)  # as MeanFlow
    # The largest w to draw; None disables guidance and the knobs.
    w: float | None = Field(default=8.0, gt=1)
    slope: Slope = DualSlope()

    @model_validator(mode="after")
    def _require_rows_at_rest(self) -> "ImprovedMeanFlow":
        if not self.times.trains_velocity:
            raise ValueError(
                "du/dt is taken along the network's velocity, which is trained at r = t: use times.kind=pair or jumps"
            )
        return self

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the distributions of the knobs.

        The defaults for sampling are those of XL/2 in one pass (its `eval_config.yml`).
        """
        if self.w is None:
            return Needs(inputs=("t", "r"), heads=("u", "v"), slope=self.slope)
        laws = {"w": Uniform(), "low": Uniform(high=0.5), "high": Uniform(low=0.5)}
        knobs = {"w": self.w, "low": 0.42, "high": 0.62}
        return Needs(inputs=("t", "r"), heads=("u", "v"), knobs=knobs, laws=laws, slope=self.slope)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute MeanFlow's Eq. 9 and 11, along V, with its Eq. 22 for both heads."""
        knobs = self._knobs(b)
        heads = heads_at_rest(net, ref, b, **knobs)
        with torch.no_grad():
            v, v_star = self._velocities(ref, b, knobs, heads[1] if heads else None)
        (u_hat, v_hat), along = self.slope(
            net, ref, b.x_t, b.c, t=b.t, r=b.r, direction=v, moving=b.moving, resting=heads, **knobs
        )
        with torch.no_grad():
            du_dt, _ = along(v)
            u_star = v_star - lift(b.t - b.r, b.x_t) * du_dt  # (1)
        u_error = u_hat - u_star
        v_error = v_hat - v_star
        u_loss = adaptive_l2(u_error, self.power, self.floor)  # MeanFlow, Eq. 22
        v_loss = adaptive_l2(v_error, self.power, self.floor)
        parts = {"u": mean_square(u_error), "v": mean_square(v_error)}
        return Terms(u_loss + v_loss, parts, {"clipped_share": clipped_share(u_error)})

    def _knobs(self, b: NoisyBatch) -> dict[str, Time]:
        """Return the knobs of each row: w log-uniform from 1; if r = t, guidance at all times."""
        if self.w is None:
            return {}
        is_velocity = b.r == b.t
        return {
            "w": (b.drawn["w"] * log(self.w)).exp(),
            "low": b.drawn["low"].masked_fill(is_velocity, 0),
            "high": b.drawn["high"].masked_fill(is_velocity, 1),
        }

    def _velocities(
        self, ref: Frozen, b: NoisyBatch, knobs: dict[str, Time], resting: Array | None
    ) -> tuple[Sample, Sample]:
        """Return V and v* of each row, by a pass with and one without the condition.

        resting: V of the rows with r = t, if it is computed already. Their guidance acts at all times, as in (2).
        """
        if not knobs:
            return self._velocity(ref, b, {}, resting), b.v_t
        ones = torch.ones_like(b.t)
        inside = (knobs["low"] <= b.t) & (b.t <= knobs["high"])
        w = knobs["w"].where(inside, ones)
        v = self._velocity(ref, b, {"w": w, "low": 0 * ones, "high": ones}, resting)  # (2)
        with dropout.off():
            v_null = ref(b.x_t, b.null, t=b.t, r=b.t, w=ones, low=0 * ones, high=ones)[1]
        v_star = b.v_t + lift(b.kept * (1 - 1 / w), b.x_t) * (v - v_null)  # (3); v_t for dropped labels
        return v, v_star

    def _velocity(self, ref: Frozen, b: NoisyBatch, knobs: dict[str, Time], resting: Array | None) -> Sample:
        """Return V of each row, by a pass of the rows for which it is not computed already."""
        if resting is None:
            return ref(b.x_t, b.c, t=b.t, r=b.t, **knobs)[1]
        moving_rows, resting_rows = b.moving_and_resting_rows
        if not moving_rows:
            return resting.detach()
        i = index(moving_rows, b.t.device)
        moving = b[i]
        with dropout.rows(i):
            v = ref(moving.x_t, moving.c, t=moving.t, r=moving.t, **{name: knob[i] for name, knob in knobs.items()})[1]
        return merge_rows(v, resting.detach(), moving_rows, resting_rows)

    def readings(self, net: Net) -> Readings:
        """Return jumps from t to r with u. The v head is used in training only, as in the authors' code.

        With knobs there is no velocity, because r = t is trained with guidance at all times, not in an interval.
        """
        readings = mean_velocity(net)
        return replace(readings, velocity=None) if self.w else readings
