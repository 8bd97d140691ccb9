"""TVM (Terminal Velocity Matching, Zhou et al. 2025, arXiv 2511.19797): the end of a jump moves with the flow.

A jump from t to r equals the flow's if it stays in place at r = t, and if its end moves with the flow as r changes.
With w for the scale of guidance, and the network's own u(x, r, r) for the velocity at the end,

    f(x_t, t, r) = x_t - (t - r) u(x_t, t, r)                                                 (1)
    df/dr = v(f, r)        so        u - (t - r) du/dr = u(f, r, r)                           (2)
    u(x_s, s, s) = v*,        v* = V(null) + w (v_s - V(null))                                (3)

Here s is a further time, v_s = dx_s/ds is the velocity of the same data and noise, and V(null) = u(x_s, s, s) without a
condition. The right side of (2) and V(null) are of theta^-, an EMA. The derivative is part of the loss, not of a
target: gradients pass through it. At r = t (2) has no content, and the loss has (3) only.

DuMo and MeanFlow differentiate with respect to the start of a jump, along x_t; TVM, as LSD, with respect to its end r.
LSD trains (2) and (3) on different rows, TVM trains both on every row.

File names below refer to the authors' code. Their network returns u / w (`do_scale_param`); ours returns u.
"""

from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    Frozen,
    Gap,
    LogitNormal,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Terms,
    Times,
    dropout,
    heads_and_end_derivatives,
    lift,
    mean_square,
    mean_velocity,
)


class TVM(ObjectiveSpec):
    """Mean velocity from t to r by its derivative in r, and the velocity at a further time s, both on every row."""

    kind: Literal["tvm"] = "tvm"
    times: Times = Gap()  # sample_ts of `loss.py`
    drop: float = Field(default=0.1, ge=0, le=1)  # label_dropout of `im256_w2.yaml`
    scale: float = Field(default=2.0, ge=1)  # w, cfg of `im256_w2.yaml`; 1 means no guidance

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss.

        With guidance, beta = 1 / w is an input, which is 1 on rows without a label.
        """
        return Needs(
            inputs=("t", "r"),
            heads=("u",),
            knobs={"beta": 1 / self.scale} if self.scale != 1 else {},
            laws={"s": LogitNormal(mean=-0.4)},  # s_prime of `loss.py`
            guide=self.scale,
            ref=0.99,  # ema_target_beta of `im256_w2.yaml`
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the sum of the mean squares of (2) and (3) for each row, times beta^2 (`wrapper.py`)."""
        beta = torch.ones_like(b.t).masked_fill(b.kept, 1 / self.scale)
        knobs = {"beta": beta} if self.scale != 1 else {}

        # The end of the jump, and its velocity.
        (u_hat,), (du_dr,) = heads_and_end_derivatives(
            net, b.x_t, b.c, t=b.t, r=b.r, moving=b.moving, recorded=True, **knobs
        )
        gap = lift(b.t - b.r, b.x_t)
        with torch.no_grad():
            x_r = b.x_t - gap * u_hat  # (1)
            (v_r,) = ref(x_r, b.c, t=b.r, r=b.r, **knobs)
        has_step = b.r < b.t
        terminal = beta**2 * has_step * mean_square(u_hat - gap * du_dr - v_r)  # (2)

        # The velocity at time s.
        b_s = b.at(b.drawn["s"])
        (v_hat,) = net(b_s.x_t, b_s.c, t=b_s.t, r=b_s.t, **knobs)
        v_star = b_s.v_t
        if self.scale != 1:
            with dropout.off():
                (v_null,) = ref(b_s.x_t, b_s.null, t=b_s.t, r=b_s.t, beta=torch.ones_like(beta))
            v_star = v_null + lift(1 / beta, b_s.x_t) * (b_s.v_t - v_null)  # (3), w = 1 / beta
        flow = beta**2 * mean_square(v_hat - v_star)
        return Terms(terminal + flow, {"terminal": terminal, "flow": flow})

    def readings(self, net: Net) -> Readings:
        """Return the readings of the mean velocity from t to r, guided as the knob beta says."""
        return mean_velocity(net)
