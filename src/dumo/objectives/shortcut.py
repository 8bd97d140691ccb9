"""Shortcut (Frans et al. 2025, arXiv 2410.12557): one step of size d = 2^-k equals two of half the size.

The mean velocity u(x_t, t, k) = (x_t - x_(t-d)) / d of a step is the mean over its halves:

    u_1 = u(x_t, t, k + 1)                                                                    (1)
    x' = x_t - d/2 u_1,        u_2 = u(x', t - d/2, k + 1)                                    (2)
    u* = (u_1 + u_2) / 2        if r = t - d,           u* = v_t        if r = t              (3)

Steps of one size are targets for steps of twice the size. The finest level, k = levels, is the limit of steps of size
0: it is trained with v_t, and the first doubling uses two Euler steps.

Unlike DuMo, the network gets the size of the step, and there is no derivative.

The guidance scale of the baseline (`scale`) is applied in the first doubling alone, so the finest level is not guided.
With `w`, the scale is an input of the network at every level, as in iSM (arXiv 2510.21250, intrinsic guidance): the
halves in (1) and (2) get the w of their row, and the finest level is trained with

    v* = v_t + (w - 1) (u(x_t, t, c; 1) - u(x_t, t, null; 1))    inside `interval`            (4)
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.times import Dyadic
from dumo.objectives.base import (
    Cond,
    Frozen,
    Interval,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Terms,
    Time,
    Uniform,
    dropout,
    index,
    lift,
    mean_square,
)
from dumo.types import QUIET

_W_STEP = 0.25  # between the values of w that are drawn; as iSM
_ROUNDING = 1e-6  # the tolerance for the number of steps


class Shortcut(ObjectiveSpec):
    """Steps of 2^-k, each learned from the next finer ones. Guidance is applied in the first doubling."""

    clip: ClassVar[float] = 4.0  # bound of x' and u*: `targets_shortcut.py`, for data of about unit scale
    kind: Literal["shortcut"] = "shortcut"
    times: Dyadic = Dyadic()  # its code
    drop: float = Field(default=0.1, ge=0, le=1)  # `class_dropout_prob`
    scale: float = Field(default=1.5, gt=0)  # the guidance scale, `cfg_scale`; 1 means no guidance
    # The largest w of (4) to draw, 4.5 in iSM; None means that the network has no such input.
    w: float | None = Field(default=None, ge=1 + _W_STEP)
    # The times at which the target is guided, by `scale` or by `w`. iSM's end at 0.7.
    interval: Interval = Field(default=Interval(), json_schema_extra=QUIET)

    @model_validator(mode="after")
    def _require_one_guidance(self) -> "Shortcut":
        if self.w is not None and self.scale != 1:
            raise ValueError(f"scale = {self.scale:g} would guide a target that w guides already: set scale=1")
        return self

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the average theta^-, `bootstrap_ema` of the authors' code."""
        if self.w is None:
            return Needs(inputs=("t", "k"), heads=("u",), guide=self.scale, ref=0.999)
        # The default for sampling is the scale of the baseline.
        knobs = {"w": min(self.w, 1.5)}
        return Needs(inputs=("t", "k"), heads=("u",), knobs=knobs, laws={"w": Uniform()}, ref=0.999)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the mean square of each row."""
        k = self._level(b.t - b.r)
        knobs = self._knobs(b)
        (u_hat,) = net(b.x_t, b.c, t=b.t, k=k, **knobs)
        u_star = b.v_t.clone()
        rows, rows_at_rest = b.moving_and_resting_rows
        if rows_at_rest and knobs:
            i = index(rows_at_rest, k.device)
            with dropout.rows(i):
                u_star[i] = self._guided_velocity(ref, b[rows_at_rest], knobs["w"][i]).to(u_star)  # (4)
        if rows:
            i = index(rows, k.device)
            with dropout.rows(i):
                u_mean = self._mean_of_halves(ref, b[rows], k[i], {name: knob[i] for name, knob in knobs.items()})
            u_mean = u_mean.to(u_star)
            u_star[i] = torch.where(lift(b.r < b.t, b.x_t)[i], u_mean, u_star[i])  # (3)
        u_loss = mean_square(u_hat - u_star)
        return Terms(u_loss, {"u": u_loss})

    def _knobs(self, b: NoisyBatch) -> dict[str, Time]:
        """Return w of each row, a multiple of _W_STEP; it is 1 on half of the rows with r = t (our choice).

        iSM gives the same weight to the plain and the guided velocity, each as a loss of its own.
        """
        if self.w is None:
            return {}
        steps = int((self.w - 1) / _W_STEP + _ROUNDING)
        share = b.drawn["w"].to(b.t)
        for_jumps = (share * (steps + 1)).floor()
        for_velocity = torch.where(share < 1 / 2, 0, 1 + ((2 * share - 1) * steps).floor())
        return {"w": 1 + _W_STEP * torch.where(b.r < b.t, for_jumps, for_velocity)}

    @torch.no_grad()
    def _guided_velocity(self, ref: Frozen, b: NoisyBatch, w: Time) -> Sample:
        """Return v* of (4); v_t for dropped labels and outside the interval."""
        finest = torch.full_like(b.t, self.times.levels)
        ones = torch.ones_like(w)
        (v_c,) = ref(b.x_t, b.c, t=b.t, k=finest, w=ones)
        with dropout.off():
            (v_null,) = ref(b.x_t, b.null, t=b.t, k=finest, w=ones)
        is_guided = b.kept & self.interval.holds(b.t)
        return b.v_t + lift(is_guided * (w - 1), b.x_t) * (v_c - v_null)

    @torch.no_grad()
    def _mean_of_halves(self, ref: Frozen, b: NoisyBatch, k: Time, knobs: dict[str, Time]) -> Sample:
        """Return the mean of two steps of half the size, guided if these are the finest."""
        half = torch.exp2(-k - 1)  # d/2
        is_first_doubling = k == self.times.levels - 1

        def u(x: Sample, t: Time) -> Sample:
            """Return the mean velocity of a step of half the size."""
            (u_c,) = ref(x, b.c, t=t, k=k + 1, **knobs)
            if self.scale == 1:
                return u_c
            with dropout.off():
                (u_null,) = ref(x, b.null, t=t, k=k + 1)
            is_guided = lift(is_first_doubling & self.interval.holds(t), x)
            return torch.where(is_guided, u_null + self.scale * (u_c - u_null), u_c)

        u_1 = u(b.x_t, b.t)  # (1)
        x_half = (b.x_t - lift(half, b.x_t) * u_1).clamp(-self.clip, self.clip)
        u_2 = u(x_half, b.t - half)  # (2)
        return ((u_1 + u_2) / 2).clamp(-self.clip, self.clip)

    def readings(self, net: Net) -> Readings:
        """Return the velocity, and steps of 2^-k on their grid. There is no endpoint, which needs steps of any size."""

        def flow_map(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
            return x - lift(t - s, x) * net(x, c, t=t, k=self._level(t - s))[0]

        return Readings(
            velocity=lambda x, t, c: net(x, c, t=t, k=torch.full_like(t, self.times.levels))[0],
            flow_map=flow_map,
            hops=self._is_trained,
        )

    def _level(self, step: Time) -> Time:
        """Return k of a step 2^-k, and `levels` for a step of 0."""
        return -step.log2().clamp(min=-self.times.levels).round()

    def _is_trained(self, t: float, s: float) -> bool:
        """Whether the size and the start of a step were trained."""
        return any(t - s == 2.0**-k and t * 2.0**k % 1 == 0 for k in range(self.times.levels + 1))
