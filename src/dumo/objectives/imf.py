"""Improved MeanFlow (Geng et al. 2025, arXiv 2512.02012): the mean velocity, its derivative along the net's own v.

MeanFlow's identity holds along the flow, whose velocity v(x_t, t) is the mean of v_t:

    u + (t - r) du/dt = v,      d/dt along v        so        u* = v* - (t - r) du/dt             (1)

Regression finds the mean of v* by itself. The direction of du/dt need not be a draw as well: here it is the velocity V
that a second head has learned, so the only noise left in the target is that of v*. And the scale w of guidance is an
input of the net, with the interval [low, high] in which it acts: a user sets these knobs when sampling.

    V = V(x_t, c; w'),      w' = w in the interval, else 1                                        (2)
    v* = v_t + (1 - 1 / w') (V - V(x_t, null; 1))                                                 (3)
    v*  settles at  V(null) + w' (E[v_t] - V(null))

Unlike DuMo: u ends at any time r, and only u is read when sampling.
"""

from dataclasses import replace
from math import log
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dumo.objectives.base import (
    Frozen,
    JvpSlope,
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
    lift,
    mean_square,
    mean_velocity,
)


class ImprovedMeanFlow(ObjectiveSpec):
    """Mean velocity from t to r and, on every row, the velocity, both guided as the knobs say."""

    power: ClassVar[float] = 1.0  # p of MeanFlow's Eq. 22, for both heads
    floor: ClassVar[float] = 0.01  # c of it, as its code
    kind: Literal["imf"] = "imf"
    times: Times = Pair(of=LogitNormal(mean=-0.4, std=1.0), velocity_ratio=0.5)  # its code, `imf.py`
    drop: float = Field(default=0.1, ge=0, le=1)  # as MeanFlow
    w: float | None = Field(default=8.0, gt=1)  # the largest w drawn; its code. None: no guidance, and no knobs
    slope: Slope = JvpSlope()  # its code

    @model_validator(mode="after")
    def _require_rows_at_rest(self) -> "ImprovedMeanFlow":
        if not self.times.teaches_velocity:
            raise ValueError(
                "du/dt is along the net's velocity, which is learned at r = t: use times.kind=pair or jumps"
            )
        return self

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net; knobs are drawn as in its code.

        In sampling they have the values of one pass with XL/2 (its `eval_config.yml`).
        """
        if self.w is None:
            return Needs(inputs=("t", "r"), heads=("u", "v"), slope=self.slope)
        laws = {"w": Uniform(), "low": Uniform(high=0.5), "high": Uniform(low=0.5)}
        knobs = {"w": self.w, "low": 0.42, "high": 0.62}
        return Needs(inputs=("t", "r"), heads=("u", "v"), knobs=knobs, laws=laws, slope=self.slope)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """MeanFlow's Eq. 9 and 11, along V; both heads under its Eq. 22."""
        knobs = self._knobs(b)
        with torch.no_grad():
            v, v_star = self._velocities(ref, b, knobs)
        (u_hat, v_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, toward=v, moving=b.moving, **knobs)
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
        """The net's inputs for guidance: w log-uniform from 1 on; where r = t, guidance at all times."""
        if self.w is None:
            return {}
        at_rest = b.r == b.t
        return {
            "w": (b.drawn["w"] * log(self.w)).exp(),
            "low": b.drawn["low"].masked_fill(at_rest, 0),
            "high": b.drawn["high"].masked_fill(at_rest, 1),
        }

    def _velocities(self, ref: Frozen, b: NoisyBatch, knobs: dict[str, Time]) -> tuple[Sample, Sample]:
        """V, the net's own velocity, guided as the row is at t; and v*. They take a pass, and one of the null."""
        if not knobs:
            v = ref(b.x_t, b.c, t=b.t, r=b.t)[1]
            return v, b.v_t
        ones = torch.ones_like(b.t)
        inside = (knobs["low"] <= b.t) & (b.t <= knobs["high"])
        w = knobs["w"].where(inside, ones)
        v = ref(b.x_t, b.c, t=b.t, r=b.t, w=w, low=0 * ones, high=ones)[1]  # (2)
        with dropout.off():
            v_null = ref(b.x_t, b.null, t=b.t, r=b.t, w=ones, low=0 * ones, high=ones)[1]
        v_star = b.v_t + lift(b.kept * (1 - 1 / w), b.x_t) * (v - v_null)  # (3); rows without a label learn v_t
        return v, v_star

    def readings(self, net: Net) -> Readings:
        """The u head jumps from t to r. The v head is read in training alone, as with the authors.

        With knobs there is no velocity: r = t is taught with guidance at all times, not in an interval.
        """
        readings = mean_velocity(net)
        return replace(readings, velocity=None) if self.w else readings
