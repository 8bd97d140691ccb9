"""Three heads (Duality Models, arXiv 2602.17682, Sec. 4.3): DuMo's two and a mean velocity, on one trunk.

    v(x_t, t)      dx_t/dt                   v*                       (1)  flow matching, Eq. 3
    u(x_t, t)      (x_t - x_0) / t           v* - t du/dt             (2)  DuMo, Alg. 1
    m(x_t, t, r)   (x_t - x_r) / (t - r)     v* - (t - r) dm/dt       (3)  MeanFlow, Eq. 11, for `average`
                                             (m_1 + m_2) / 2          (4)  for `shortcut`

with m_1 and m_2 the mean velocities of theta^- over both halves of [r, t]. One slope along v* computes the derivatives
of all heads. In dumo's own networks only the output layer of m depends on r, so the losses of v and u are bit-identical
to DuMo's for any r. In other networks all heads may depend on r; then v and u are read at r = 0.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.objectives.base import (
    Below,
    Beta,
    CentralSlope,
    Cond,
    Frozen,
    Guide,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Slope,
    Terms,
    Time,
    Times,
    clipped_share,
    dropout,
    index,
    lift,
    mean_square,
    mean_velocity,
)

# Weights of the mean squares of the heads: DuMo's beta (Tab. 3), and our choice, because the paper does not specify it.
V_WEIGHT = 0.7
U_WEIGHT = 0.15
M_WEIGHT = 0.15
_ROWS_TRIED = 1000  # among this many rows, the distribution of times must have one with r = t


class Several(ObjectiveSpec):
    """Velocity, flow map to the data and mean velocity, all trained on every row."""

    kind: Literal["several"] = "several"
    # The target of m: MeanFlow's, or Shortcut's.
    third: Literal["average", "shortcut"] = "average"
    times: Times = Below(of=Beta(a=2.4, b=2.4))  # t as DuMo, Tab. 3; r is our choice
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    guide: Guide = Guide(zeta=0.55)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo
    # Train v and u only on rows with r = t, with a weight of 1 / their share (ours).
    apart: bool = False

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        return Needs(heads=("v", "u", "m"), own={"m": ("r",)}, slope=self.slope, guide=self.guide)

    @model_validator(mode="after")
    def _require_rows_at_rest(self) -> "Several":
        needs_velocity_rows = self.third == "shortcut" or self.apart
        moving = self.times.moving(_ROWS_TRIED)
        if needs_velocity_rows and (moving is None or all(moving)):
            raise ValueError(
                f"third=shortcut and apart=true need rows with r = t, but times '{self.times.kind}' has none: use "
                "times.kind=dyadic, or pair with a velocity_ratio, or third=average with apart=false"
            )
        return self

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the weighted sum over the heads, with the clipped share of the errors as metrics."""
        direction = self.guide.known_target(b)
        (v_hat, u_hat, m_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, direction=direction)
        with torch.no_grad():
            v_star = self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t, r=b.r)[0])
            _, du_dt, dm_dt = along(v_star)
            u_star = v_star - lift(b.t, b.x_t) * du_dt  # (2)
            gap = lift(b.t - b.r, b.x_t)
            # (3) or (4)
            m_star = v_star - gap * dm_dt if self.third == "average" else _mean_of_halves(ref, b, v_star)
        u_error = u_hat - u_star
        m_error = m_hat - m_star
        parts = {"v": mean_square(v_hat - v_star), "u": mean_square(u_error), "m": mean_square(m_error)}
        # The weight of v and u.
        row_weight = 1
        if self.apart:
            row_weight = (b.r == b.t).to(b.t) / (1 - self.times.moving_share)
        loss = V_WEIGHT * row_weight * parts["v"] + U_WEIGHT * row_weight * parts["u"] + M_WEIGHT * parts["m"]
        notes = {"clipped_share_u": clipped_share(u_error)}
        if self.third == "average":
            notes["clipped_share_m"] = clipped_share(m_error)
        return Terms(loss, parts, notes)

    def readings(self, net: Net) -> Readings:
        """Return the velocity v, the endpoint with u, and jumps to any time with m."""

        def both(x: Sample, t: Time, c: Cond) -> tuple[Sample, Sample]:
            v, u, _ = net(x, c, t=t, r=0 * t)
            return v, x - lift(t, x) * u

        return Readings(
            velocity=lambda x, t, c: both(x, t, c)[0],
            endpoint=lambda x, t, c: both(x, t, c)[1],
            both=both,
            flow_map=mean_velocity(net, head=2).flow_map,
        )


def _mean_of_halves(ref: Frozen, b: NoisyBatch, v_star: Sample) -> Sample:
    """Return m* of (4), the mean of m over both halves of [r, t], by two consecutive passes of theta^-; v* if r = t.

    As Frans et al. 2025 (arXiv 2410.12557, Eq. 4 and 5), but m gets r instead of the level k. For the finest half, a
    size that is not trained, m interpolates; theirs uses the velocity. Nothing is clipped (our choice).
    """
    rows, _ = b.moving_and_resting_rows
    if not rows:
        return v_star
    i = index(rows, v_star.device)
    b = b[rows]
    middle = (b.t + b.r) / 2
    with dropout.rows(i):
        m_1 = ref(b.x_t, b.c, t=b.t, r=middle)[2]
        x_middle = b.x_t - lift(b.t - middle, m_1) * m_1
        m_2 = ref(x_middle, b.c, t=middle, r=b.r)[2]
    m_star = v_star.clone()
    m_star[i] = ((m_1 + m_2) / 2).to(m_star).where(lift(b.r < b.t, m_1), m_star[i])
    return m_star
