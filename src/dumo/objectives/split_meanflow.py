"""SplitMeanFlow (Guo et al. 2025, arXiv 2507.16884): a jump is the weighted mean of its parts, wherever it is split.

Let s split the jump from t to r, with a share lam of it before s. Displacements add up, (t - r) u = x_t - x_r, so

    s = (1 - lam) t + lam r                                                                   (1)
    u_2 = u(x_t, t, s)                                                                        (2)
    x_s = x_t - (t - s) u_2,        u_1 = u(x_s, s, r)                                        (3)
    u* = lam u_2 + (1 - lam) u_1        if r < t,           u* = v_t        if r = t          (4)

The parts say nothing about the data, and any constant satisfies (4) at r < t. The data enter at r = t only, where u is
the velocity, by flow matching. As lam goes to 0, (4) becomes MeanFlow's identity.

Unlike DuMo and MeanFlow there is no derivative. Shortcut models have lam = 1/2, on a grid. The paper guides by a
teacher (`teacher.guide`).

The authors have published no code. Unofficial ports disagree on the share of rows with r = t and on theta^-.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.objectives.base import (
    STRAIGHT,
    Frozen,
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
    index,
    lift,
    mean_square,
    mean_velocity,
)


class SplitMeanFlow(ObjectiveSpec):
    """Mean velocity from t to r by its two parts, with a share of the rows at r = t."""

    kind: Literal["split_meanflow"] = "split_meanflow"
    times: Times = Pair(of=Uniform(), velocity_ratio=0.75)  # two sorted draws (Alg. 1); the share is our choice
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        return Needs(inputs=("t", "r"), heads=("u",), laws={"lam": Uniform()}, formulas=STRAIGHT)

    @model_validator(mode="after")
    def _require_velocity_rows(self) -> "SplitMeanFlow":
        if self.times.moving_share == 1:
            raise ValueError(
                f"times '{self.times.kind}' has no rows with r = t, the only ones that learn from the data: use "
                "times.velocity_ratio=0.75"
            )
        return self

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the mean square of u - u* for each row."""
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        u_star = b.v_t.clone()
        rows, _ = b.moving_and_resting_rows
        if rows:
            i = index(rows, b.t.device)
            with dropout.rows(i):
                u_mean = self._mean_of_parts(ref, b[rows]).to(u_star)
            u_star[i] = torch.where(lift(b.r < b.t, b.x_t)[i], u_mean, u_star[i])  # (4)
        u_loss = mean_square(u_hat - u_star)
        return Terms(u_loss, {"u": u_loss})

    def _mean_of_parts(self, ref: Frozen, b: NoisyBatch) -> Sample:
        """Return the mean of the velocities of both parts of a jump, weighted by their lengths."""
        lam = b.drawn["lam"].to(b.t)
        s = (1 - lam) * b.t + lam * b.r  # (1)
        (u_2,) = ref(b.x_t, b.c, t=b.t, r=s)  # (2)
        x_s = b.x_t - lift(b.t - s, b.x_t) * u_2
        (u_1,) = ref(x_s, b.c, t=s, r=b.r)  # (3)
        share = lift(lam, b.x_t)
        return share * u_2 + (1 - share) * u_1

    def readings(self, net: Net) -> Readings:
        """Return the readings of the mean velocity from t to r."""
        return mean_velocity(net)
