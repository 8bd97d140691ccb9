"""DuMo: one input, two outputs (Duality Models, arXiv 2602.17682, Sec. 3 and Alg. 1).

One pass of F(x_t, t, c) gives both the velocity v = dx_t/dt and the flow map u = (x_t - x_0) / t.
Differentiating t u = x_t - x_0 along the flow gives the identity that trains u without a teacher:

    u + t du/dt = v        so        u* = v* - t du/dt
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.disperse import Dispersed, dispersed, looking
from dumo.flow.guide import Guide
from dumo.flow.reading import jump_to_data
from dumo.flow.residual import Contrast, clipped_share, contrasted, demand_unbent, head_gap
from dumo.flow.slope import CentralSlope, Slope
from dumo.flow.times import Beta, Times
from dumo.flow.weight import Line, Share, by_variance, weight_at
from dumo.types import Cond, Frozen, Needs, Net, Noised, Reads, Sample, Spec, Terms, Time, lift, mean_square

Weighed = Annotated[tuple[Literal["v", "u"], ...], Field(exclude_if=lambda names: not names)]


class DuMo(Spec):
    """Velocity and flow map, both regressed on every sample."""

    kind: Literal["dumo"] = "dumo"
    times: Times = Beta(a=2.4, b=2.4)  # line 3; (theta_1, theta_2) of Tab. 3
    drop: float = Field(default=0.1, ge=0, le=1)  # UCGM; the paper is silent
    beta: Share = 0.7  # weight of the velocity, Eq. 9 and Tab. 3; a line over the training is ours
    variance: Weighed = ()  # heads whose error is divided by its variance at t, which is learned (EDM2, Eq. 21)
    disperse: Dispersed = None  # what a block makes of its rows lies apart
    guide: Guide = Guide(zeta=0.55)  # line 9 and Tab. 3
    slope: Slope = CentralSlope(h=0.005)  # Sec. 3.3; h as UCGM
    contrast: Contrast = 0.0  # of v's targets (Stoica et al. 2025, who take 0.05)

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        gauges, group = tuple(f"log_variance_{name}" for name in self.variance), 2 if self.contrast else 1
        needs = Needs(("t",), ("v", "u"), gauges, slope=self.slope, guide=self.guide, group=group)
        return looking(needs, self.disperse)

    @model_validator(mode="after")
    def _possible(self) -> "DuMo":
        demand_unbent(self.contrast, self.guide)
        if isinstance(self.beta, Line) and (most := max(self.beta.first, self.beta.last)) > 1:
            raise ValueError(f"beta is a share, and its line goes to {most:g}: let it end at 1 or below")
        if len(set(self.variance)) < len(self.variance):
            raise ValueError(f"variance names a head twice: {', '.join(self.variance)}")
        if self.contrast and "v" in self.variance:
            raise ValueError("contrast is no square, so it has no variance: leave v out of variance, or set contrast=0")
        return self

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Lines 7 to 12 of Alg. 1."""
        toward = self.guide.known_target(b)
        (v_hat, u_hat, *more), along = self.slope(net, ref, b.x_t, b.c, t=b.t, toward=toward)  # line 7
        with torch.no_grad():
            v_star = self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t)[0])  # lines 8 and 9
            _, du_dt, *_ = along(v_star)
            u_star = v_star - lift(b.t, b.x_t) * du_dt  # line 10
        v_error, u_error = v_hat - v_star, u_hat - u_star
        v_loss, u_loss = mean_square(v_error), mean_square(u_error)
        learned, beta = dict(zip(self.variance, more, strict=False)), weight_at(self.beta, b.progress)
        v_all = contrasted(v_loss, v_hat, v_star, self.contrast)
        v_part, u_part = by_variance(v_all, learned.get("v")), by_variance(u_loss, learned.get("u"))
        loss = beta * v_part + (1 - beta) * u_part  # line 12
        notes = {"clipped_share": clipped_share(u_error), "head_gap": head_gap(v_error, u_error)}
        notes |= {f"log_variance_{name}": w.detach() for name, w in learned.items()}
        return dispersed(Terms(loss, {"v": v_loss, "u": u_loss}, notes), self.disperse, more)

    def read(self, net: Net) -> Reads:
        """The v head is the slope of the path; the u head jumps to the data, x_0 = x_t - t u (Eq. 6)."""

        def both(x: Sample, t: Time, c: Cond) -> tuple[Sample, Sample]:
            v, u, *_ = net(x, c, t=t)
            return v, x - lift(t, x) * u

        return Reads(velocity=lambda x, t, c: net(x, c, t=t)[0], endpoint=jump_to_data(net, head=1), both=both)
