"""F2D2 (Ai et al. 2025, arXiv 2512.02636): jumps with the growth of the log volume, for likelihood in a few passes.

A head g is added to velocity and mean velocity. With J = dv/dx, of theta^-, and a row of random signs e:

    v(x_t, t)      dx_t/dt                          v* = v_t                              (1)
    u(x_t, t, r)   (x_t - x_r) / (t - r)            u* = v_t - (t - r) du/dt              (2)  (MeanFlow, Eq. 11)
    g(x_t, t, r)   the mean of diag J over [r, t]   g* = diag J - (t - r) dg/dt           (3)
    diag J         e_i (J e)_i, averaged over e                                           (4)

(3) is derived like (2): (t - r) g is an integral along the flow with the derivative diag J in t. The sum of g over a
row is the mean of div v, so jumps from t up to s add up to the likelihood:

    log p(x_0) = log N(x_1) + the sum over jumps of (s - t) sum_i g_i                     (5)

Unlike DuMo, u ends at any time r, there is no guidance, and jumps also go towards the noise. Our g has the shape of the
data, and J is that of the network; theirs are a number per row, and a teacher's.
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

# Weights of the mean squares of the heads (our choice).
V_WEIGHT = 0.55
U_WEIGHT = 0.35
G_WEIGHT = 0.1


class F2D2(ObjectiveSpec):
    """Velocity, mean velocity and divergence, all trained on every row."""

    kind: Literal["f2d2"] = "f2d2"
    times: Times = Jumps(both_ways=True)  # ours
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and one draw of signs per row, as in the authors' code."""
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
            raise ValueError("likelihood needs jumps towards the noise: use times.kind=jumps with both_ways=true")
        return self

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Make one pass, with its derivative on the rows with a jump, and one dual pass for J e."""
        (v_hat, u_hat, g_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, direction=b.v_t, moving=b.moving)
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
        """Return the velocity v, jumps to any time with u, and jumps to the noise with the growth of the log volume."""

        def climb(x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
            """Return x_s, and the term of (5)."""
            _, u, g = net(x, c, t=t, r=s)
            return x + lift(s - t, x) * u, (s - t) * g.flatten(1).sum(1)

        return replace(mean_velocity(net, head=1, velocity_head=0), climb=climb)
