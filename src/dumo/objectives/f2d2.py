"""F2D2 (Ai et al. 2025, arXiv 2512.02636): jumps know how much volume they grow, so likelihood takes a few passes.

    v(x_t, t)      dx_t/dt                          v* = v_t
    u(x_t, t, r)   (x_t - x_r) / (t - r)            u* = v* - (t - r) du/dt            (MeanFlow, Eq. 11)
    g(x_t, t, r)   the mean of diag J over [r, t]   g* = e (J e) - (t - r) dg/dt       with J = dv/dx of theta^-

(t - r) g is an integral along the flow, whose derivative at t is diag J; random signs e have e_i (J e)_i = J_ii in the
mean. So log p(x_0) = log N(x_1) + the sum of (s - t) sum_i g_i over jumps from t up to s. A g of the shape of the data
is ours: theirs is one number a row, and its J is a teacher's.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.draw import Signs
from dumo.flow.likelihood import diagonal
from dumo.flow.reading import mean_velocity
from dumo.flow.residual import clipped_share
from dumo.flow.slope import CentralSlope, Slope
from dumo.flow.times import Jumps, Times
from dumo.types import (
    Cond,
    Formulas,
    Frozen,
    Needs,
    Net,
    Noised,
    PerSample,
    Reads,
    Sample,
    Spec,
    Terms,
    Time,
    lift,
    mean_square,
)

V, U, G = 0.55, 0.35, 0.1  # weights; ours


class F2D2(Spec):
    """Velocity, mean velocity and divergence."""

    kind: Literal["f2d2"] = "f2d2"
    times: Times = Jumps(both_ways=True)  # ours
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes; one draw of signs a row, as the authors' code."""
        own, laws = {"u": ("r",), "g": ("r",)}, {"probe": Signs()}
        return Needs(heads=("v", "u", "g"), own=own, laws=laws, slope=self.slope, formulas=Formulas(climbs=True))

    @model_validator(mode="after")
    def _climbs(self) -> "F2D2":
        if not self.times.climbs:
            raise ValueError("likelihood is read along jumps up to the noise: use times of kind jumps, both_ways=true")
        return self

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """One pass, its derivative on the rows with a jump, and one dual pass for J e."""
        (v_hat, u_hat, g_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, toward=b.v_t, moving=b.moving)
        with torch.no_grad():
            _, du_dt, dg_dt = along(b.v_t)
            e, jump = b.drawn["probe"].to(b.x_t), lift(b.t - b.r, b.x_t)
            _, square = diagonal(lambda x, t, c: ref(x, c, t=t, r=b.r)[0], b.x_t, b.t, b.c, e)
            u_star, g_star = b.v_t - jump * du_dt, square - jump * dg_dt
        errors = {"v": v_hat - b.v_t, "u": u_hat - u_star, "g": g_hat - g_star}
        parts = {name: mean_square(e) for name, e in errors.items()}
        loss = V * parts["v"] + U * parts["u"] + G * parts["g"]
        return Terms(loss, parts, {f"clipped_share_{name}": clipped_share(errors[name]) for name in ("u", "g")})

    def read(self, net: Net) -> Reads:
        """The v head is the slope of the path, u jumps to any time, and g says how much volume the jump grows."""

        def climb(x: Sample, t: Time, s: Time, c: Cond) -> tuple[Sample, PerSample]:
            _, u, g = net(x, c, t=t, r=s)
            return x + lift(s - t, x) * u, (s - t) * g.flatten(1).sum(1)

        return replace(mean_velocity(net, head=1), velocity=lambda x, t, c: net(x, c, t=t, r=t)[0], climb=climb)
