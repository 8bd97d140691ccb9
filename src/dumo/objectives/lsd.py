"""LSD (Lagrangian self-distillation, Boffi et al. 2025, arXiv 2505.18825): the end of a jump moves with the flow.

A jump from t ends at X_r(x_t), and this end must move with the velocity at its position:

    X_r(x_t) = x_t - (t - r) u(x_t, t, r)                                                     (1)
    dX_r/dr = v(X_r, r)        so        u - (t - r) du/dr = v(X_r, r)        if r < t        (2)
    v(x_t, t) = v*        if r = t                                                            (3)

The velocity is the network's own, v(x, r) = u(x, r, r). The right side of (2), with its position X_r, is detached
(`stopgrad_type: convex` in the authors' code); gradients pass through du/dr. There are no derivatives in x and t, and
the target has no noise: v_t is used at r = t only, by flow matching.

DuMo and MeanFlow differentiate with respect to the start of a jump, LSD with respect to its end. TVM (Zhou et al. 2025,
arXiv 2511.19797) has the same equation, with other times, weights and guidance.

With `two_heads` (ours) v is DuMo's head, trained by (3) on every row, and u is trained by (2). In dumo's own networks
only the output layer of u depends on r, so no derivative passes through the trunk; other networks may use r anywhere.

Sources: `lsd_term` in copies of the authors' code, and lucidrains' port, which agree (the authors' repository was not
available). They sum squares, and may divide them by a learned variance of t and r; ours does neither.
"""

from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    STRAIGHT,
    Frozen,
    Guide,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Pair,
    Readings,
    Sample,
    Terms,
    Times,
    Uniform,
    dropout,
    heads_and_end_derivatives,
    index,
    lift,
    mean_square,
    mean_velocity,
)

BETA = 0.7  # weight of the velocity head, as DuMo


class LSD(ObjectiveSpec):
    """Mean velocity from t to r by its derivative in r, and the velocity, at r = t or in a separate head."""

    kind: Literal["lsd"] = "lsd"
    times: Times = Pair(of=Uniform(), velocity_ratio=0.75)  # as the port; `diag_fraction` of their configs
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    guide: Guide = Guide()  # as the port
    two_heads: bool = False

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        if self.two_heads:
            return Needs(heads=("v", "u"), own={"u": ("r",)}, guide=self.guide, formulas=STRAIGHT)
        return Needs(inputs=("t", "r"), heads=("u",), guide=self.guide, formulas=STRAIGHT)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the mean square of (2) if r < t, of (3) if r = t, and of the head v, if there is one, on all rows."""
        heads, end_derivatives = heads_and_end_derivatives(net, b.x_t, b.c, t=b.t, r=b.r, moving=b.moving)
        u_hat = heads[-1]
        gap = lift(b.t - b.r, b.x_t)
        end_velocity = u_hat - gap * end_derivatives[-1]  # dX_r/dr; at r = t it is u
        with torch.no_grad():
            v_hat = heads[0] if self.two_heads else None
            v_star = self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t, r=b.t)[0])  # (3)
            x_r = b.x_t - gap * u_hat  # (1)
            target = self._velocity_at_the_end(ref, b, x_r, v_star)
        u_loss = mean_square(end_velocity - target)
        if not self.two_heads:
            return Terms(u_loss, {"u": u_loss})
        v_loss = mean_square(heads[0] - v_star)
        return Terms(BETA * v_loss + (1 - BETA) * u_loss, {"v": v_loss, "u": u_loss})

    def _velocity_at_the_end(self, ref: Frozen, b: NoisyBatch, x_r: Sample, v_star: Sample) -> Sample:
        """Return v(x_r, r) if r < t, and v* if r = t, by a pass of the rows that may have r < t."""
        rows, _ = b.moving_and_resting_rows
        if not rows:
            return v_star
        i = index(rows, b.t.device)
        b_step = b[rows]
        with dropout.rows(i):
            v_r = ref(x_r[i], b_step.c, t=b_step.r, r=b_step.r)[0].to(v_star)
        has_step = lift(b_step.r < b_step.t, b_step.x_t)
        return v_star.index_copy(0, i, torch.where(has_step, v_r, v_star[i]))  # (2), (3)

    def readings(self, net: Net) -> Readings:
        """Return the velocity, u at r = t or the head v, and jumps from t to any r with u."""
        if self.two_heads:
            return mean_velocity(net, head=1, velocity_head=0)
        return mean_velocity(net)
