"""F2D2 (Ai et al. 2025, arXiv 2512.02636): jumps know how much volume they grow, so likelihood takes a few passes.

A head g joins velocity and mean velocity. With J = dv/dx, of theta^-, and e a row of random signs:

    v(x_t, t)      dx_t/dt                          v* = v_t                              (1)
    u(x_t, t, r)   (x_t - x_r) / (t - r)            u* = v_t - (t - r) du/dt              (2)  (MeanFlow, Eq. 11)
    g(x_t, t, r)   the mean of diag J over [r, t]   g* = diag J - (t - r) dg/dt           (3)
    diag J         e_i (J e)_i, in the mean over e                                        (4)

(3) is derived as (2) is: (t - r) g is an integral along the flow, whose derivative in t is diag J. The sum of g over
a row is the mean of div v, so jumps from t up to s add up to the likelihood:

    log p(x_0) = log N(x_1) + the sum over jumps of (s - t) sum_i g_i                     (5)

Unlike DuMo: u ends at any time r, there is no guidance, and jumps climb to the noise, too. Ours: g has the shape of
the data, where theirs is one number a row; and J is the net's own, where theirs is a teacher's.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.likelihood import diagonal
from dumo.objectives.base import (
    CentralSlope,
    Cond,
    Formulas,
    Frozen,
    Jumps,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    PerSample,
    Readings,
    Sample,
    Signs,
    Slope,
    Terms,
    Time,
    Times,
    clipped_share,
    lift,
    mean_square,
    mean_velocity,
)

V_WEIGHT = 0.55  # of the mean squares of each head in the loss; ours
U_WEIGHT = 0.35
G_WEIGHT = 0.1


class F2D2(ObjectiveSpec):
    """Velocity, mean velocity and divergence, all regressed on every sample."""

    kind: Literal["f2d2"] = "f2d2"
    times: Times = Jumps(both_ways=True)  # ours
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and one draw of signs for each row, as in the authors' code."""
        return Needs(
            heads=("v", "u", "g"),
            own={"u": ("r",), "g": ("r",)},
            laws={"probe": Signs()},
            slope=self.slope,
            formulas=Formulas(climbs=True),
        )

    @model_validator(mode="after")
    def _require_climbing_times(self) -> "F2D2":
        if not self.times.climbs:
            raise ValueError("likelihood is read along jumps up to the noise: use times of kind jumps, both_ways=true")
        return self

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """One pass, its derivative on the rows with a jump, and one dual pass for J e."""
        (v_hat, u_hat, g_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, toward=b.v_t, moving=b.moving)
        with torch.no_grad():
            _, du_dt, dg_dt = along(b.v_t)
            e = b.drawn["probe"].to(b.x_t)
            _, diag_j = diagonal(lambda x, t, c: ref(x, c, t=t, r=b.r)[0], b.x_t, b.t, b.c, e)  # (4)
            gap = lift(b.t - b.r, b.x_t)
            u_star = b.v_t - gap * du_dt  # (2)
            g_star = diag_j - gap * dg_dt  # (3)
        u_error = u_hat - u_star
        g_error = g_hat - g_star
        parts = {"v": mean_square(v_hat - b.v_t), "u": mean_square(u_error), "g": mean_square(g_error)}
        loss = V_WEIGHT * parts["v"] + U_WEIGHT * parts["u"] + G_WEIGHT * parts["g"]
        notes = {"clipped_share_u": clipped_share(u_error), "clipped_share_g": clipped_share(g_error)}
        return Terms(loss, parts, notes)

    def readings(self, net: Net) -> Readings:
        """The v head is the slope of the path, u jumps to any time, and g says how much volume the jump grows."""

        def climb(x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
            """x_s, and the term of (5)."""
            _, u, g = net(x, c, t=t, r=s)
            return x + lift(s - t, x) * u, (s - t) * g.flatten(1).sum(1)

        return replace(mean_velocity(net, head=1, velocity_head=0), climb=climb)
