"""SplitMeanFlow (Guo et al. 2025, arXiv 2507.16884): a step is the mean of its two parts, wherever it is split.

The displacement (t - r) u = x_t - x_r is that from t to s and that from s to r, which are lam and 1 - lam of the way:

    s = (1 - lam) t + lam r                                                                   (1)
    u_2 = u(x_t, t, s)                                                                        (2)
    u_1 = u(x_s, s, r),        x_s = x_t - (t - s) u_2                                        (3)
    u* = (1 - lam) u_1 + lam u_2        where r < t,        u* = v_t        where r = t       (4)

The mean of parts says nothing of the data. They enter at r = t, where u is the velocity, and the rows there match the
flow.

Unlike DuMo there is no derivative, and no guidance: with lam = 1/2 on a grid it is a shortcut model.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.flow import dropout
from dumo.flow.reading import mean_velocity
from dumo.flow.residual import clipped_share
from dumo.flow.times import Pair, Uniform
from dumo.types import STRAIGHT, Frozen, Needs, Net, Noised, PerSample, Reads, Sample, Spec, Terms, lift, mean_square
from dumo.types.rows import index


class SplitMeanFlow(Spec):
    """Mean velocity from t to r, learned from its parts, with a share of the rows at r = t."""

    kind: Literal["split_meanflow"] = "split_meanflow"
    times: Pair = Pair(of=Uniform(), velocity_ratio=0.5)  # two of one law; the share is ours: sources disagree
    drop: float = Field(default=0.1, ge=0, le=1)  # ours

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and what else the loss needs."""
        return Needs(inputs=("t", "r"), heads=("u",), laws={"lam": Uniform()}, formulas=STRAIGHT)

    @model_validator(mode="after")
    def _require_velocity_rows(self) -> "SplitMeanFlow":
        if not self.times.velocity_ratio:
            raise ValueError("times.velocity_ratio = 0 leaves no row that matches the data: use 0.5")
        return self

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Mean squares on all rows: of the identity where r < t, of flow matching where r = t."""
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        u_star = b.v_t.clone()
        rows, _ = b.rows_by_step
        if rows:
            i = index(rows, b.t.device)
            with dropout.rows(i):
                u_mean = self._mean_of_parts(ref, b[rows]).to(u_star)
            u_star[i] = torch.where(lift(b.r < b.t, b.x_t)[i], u_mean, u_star[i])  # (4)
        error = u_hat - u_star
        u_loss = mean_square(error)
        return Terms(u_loss, {"u": u_loss}, {"clipped_share": clipped_share(error)})

    def _mean_of_parts(self, ref: Frozen, b: Noised) -> Sample:
        """The mean velocity over both parts of the step."""
        lam: PerSample = b.drawn["lam"].to(b.t)  # where s lies: 0 is t, 1 is r
        s = (1 - lam) * b.t + lam * b.r  # (1)
        (u_2,) = ref(b.x_t, b.c, t=b.t, r=s)  # (2)
        x_s = b.x_t - lift(b.t - s, b.x_t) * u_2
        (u_1,) = ref(x_s, b.c, t=s, r=b.r)  # (3)
        share = lift(lam, b.x_t)
        return (1 - share) * u_1 + share * u_2

    def read(self, net: Net) -> Reads:
        """One head, read at two times, as MeanFlow's."""
        return mean_velocity(net)
