"""LSD (Lagrangian self-distillation, Boffi et al. 2025, arXiv 2505.18825): the end of a jump moves as the flow does.

A jump from t ends at X_r(x_t). Where it follows the flow, its end moves with the velocity of the place that it is at:

    X_r(x_t) = x_t - (t - r) u(x_t, t, r)                                                     (1)
    dX_r/dr = v(X_r, r)        so        u - (t - r) du/dr = v(X_r, r)        where r < t     (2)
    v(x_t, t) = v*        where r = t                                                         (3)

The velocity is the net's own, v(x, r) = u(x, r, r). The right side of (2) is held still, and so is the place X_r in it
(`stopgrad_type: convex` of the authors' code); gradients go through du/dr. Nothing is differentiated in x or t, so the
target has no Jacobian. It has no noise either: v_t enters at r = t alone, by flow matching.

Unlike DuMo and MeanFlow, which differentiate where a jump starts, this differentiates where it ends. TVM (Zhou et al.
2025, arXiv 2511.19797) has the same equation, with other times, weights and guidance.

With `two_heads` (ours) v is DuMo's head, which learns (3) on every row, and u learns (2). On dumo's own nets only the
output layer of u gets r, so no derivative goes through the trunk; other nets may show r to all of their layers.

Read: `lsd_term` in copies of the authors' code, and lucidrains' port, which agree (the authors' repository was not
available). Theirs sums squares, and may divide them by a variance that it learns of t and r; ours does neither.
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

BETA = 0.7  # weight of the velocity where it has a head, as DuMo


class LSD(ObjectiveSpec):
    """Mean velocity from t to r by its derivative in r, and the velocity, at r = t or by a head of its own."""

    kind: Literal["lsd"] = "lsd"
    times: Times = Pair(of=Uniform(), velocity_ratio=0.75)  # the port's; `diag_fraction` of their configs
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    guide: Guide = Guide()  # none, as the port
    two_heads: bool = False

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and what else the loss needs."""
        if self.two_heads:
            return Needs(heads=("v", "u"), own={"u": ("r",)}, guide=self.guide, formulas=STRAIGHT)
        return Needs(inputs=("t", "r"), heads=("u",), guide=self.guide, formulas=STRAIGHT)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Mean squares of (2) where r < t, of (3) where r = t, and of the head v on all rows where there is one."""
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
        """v(x_r, r) on the rows with r < t, and v* on the others. The pass is of the rows that may have r < t."""
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
        """The velocity is u at r = t, or the head v; u jumps from t to any r."""
        if self.two_heads:
            return mean_velocity(net, head=1, velocity_head=0)
        return mean_velocity(net)
