"""TVM (Terminal Velocity Matching, Zhou et al. 2025, arXiv 2511.19797): the end of a jump moves along the flow.

A jump from t to r is that of the flow if it stays at t = r, and if its end moves along the flow as r does. With the
net's own u(x, r, r) for the velocity at the end, and w the scale of guidance:

    f(x_t, t, r) = x_t - (t - r) u(x_t, t, r)                                                 (1)
    df/dr = v(f, r)        so        u - (t - r) du/dr = u(f, r, r)                           (2)
    u(x_s, s, s) = v*,        v* = V(null) + w (v_s - V(null))                                (3)

s is a time of its own, v_s the velocity dx_s/ds, and V(null) = u(x_s, s, s) without a condition, by theta^- (`ref`).
Unlike DuMo and MeanFlow, which differentiate where the jump starts, along x_t, this differentiates where it ends, in r
alone. The derivative is no target here but what is trained: gradients go through it. So at r = t (2) says nothing, and
only (3) teaches.
"""

from typing import Literal

import torch
from pydantic import Field

from dumo.flow import dropout
from dumo.flow.linearize import heads_and_end_derivatives
from dumo.flow.reading import mean_velocity
from dumo.flow.times import Gap, LogitNormal, Times
from dumo.types import Frozen, Needs, Net, Noised, Reads, Spec, Terms, lift, mean_square


class TVM(Spec):
    """Mean velocity from t to r by its derivative in r, and the velocity at a time s of its own, on every row."""

    kind: Literal["tvm"] = "tvm"
    times: Times = Gap()  # `sample_ts` of the authors' `loss.py`
    drop: float = Field(default=0.1, ge=0, le=1)  # their im256_w2.yaml
    scale: float = Field(default=2.0, ge=1)  # w of (3); the net gets beta = 1 / w; their im256_w2.yaml

    @property
    def needs(self) -> Needs:
        """With guidance, beta = 1 / w is an input: 1 on rows without a label."""
        knobs = {"beta": 1 / self.scale} if self.scale != 1 else {}
        return Needs(
            inputs=("t", "r"),
            heads=("u",),
            knobs=knobs,
            laws={"s": LogitNormal(mean=-0.4)},  # the distribution from which `Gap` draws r, before r is cut off at t
            guide=self.scale,
            ref=0.99,  # decay of the EMA that is theta^-
        )

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """The authors' `wrapper.py`; beta^2 keeps the size of a guided row's residual to that of others."""
        beta = torch.ones_like(b.t).masked_fill(b.kept, 1 / self.scale)
        knobs = {"beta": beta} if self.scale != 1 else {}
        # only r moves, and gradients go through the derivative
        (u_hat,), (du_dr,) = heads_and_end_derivatives(
            net, b.x_t, b.c, t=b.t, r=b.r, moving=None, recorded=True, **knobs
        )
        with torch.no_grad():  # f would be recorded for nothing: `ref` gives no gradients
            gap = lift(b.t - b.r, b.x_t)
            f = b.x_t - gap * u_hat  # (1)
            (v_r,) = ref(f, b.c, t=b.r, r=b.r, **knobs)
        has_step = b.r < b.t
        terminal = beta**2 * has_step * mean_square(u_hat - gap * du_dr - v_r)  # (2)

        b_s = b.at(b.drawn["s"])  # the record at time s
        (v_hat,) = net(b_s.x_t, b_s.c, t=b_s.t, r=b_s.t, **knobs)
        v_star = b_s.v_t
        if self.scale != 1:
            with dropout.off():
                (v_null,) = ref(b_s.x_t, b_s.null, t=b_s.t, r=b_s.t, beta=torch.ones_like(beta))
            v_star = v_null + lift(1 / beta, b_s.x_t) * (b_s.v_t - v_null)  # (3), w = 1 / beta
        flow = beta**2 * mean_square(v_hat - v_star)
        return Terms(terminal + flow, {"terminal": terminal, "flow": flow})

    def read(self, net: Net) -> Reads:
        """One head, read at two times; guided as its knob beta says."""
        return mean_velocity(net)
