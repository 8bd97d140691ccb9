"""CMT (Hu et al. 2025, arXiv 2509.24526): mid-training on the trajectories of a teacher's solver.

The solver integrates from noise z to data x_0, and all points x_t of its trajectory are kept, so the mean velocity
between any two of them is known. V is the teacher's velocity:

    u(x_t, t, r)* = (x_t - x_r) / (t - r)                                                     (1)
    v(x_t, t)* = V(x_t, t)                                                                    (2)

Unlike DuMo, it takes no derivative. Mid-training provides the initial weights for another objective, which the field
`of` names: meanflow, with the head u, or dumo (our choice), with the heads v and u.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dumo.objectives.base import (
    FromTeacher,
    Frozen,
    Grid,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Terms,
    Time,
    lift,
    mean_square,
    mean_velocity,
)
from dumo.objectives.dumo import DuMo


class CMT(ObjectiveSpec):
    """Regression on a teacher's trajectories, before training with another objective."""

    beta: ClassVar[float] = 0.7  # weight of the velocity for dumo, as DuMo
    kind: Literal["cmt"] = "cmt"
    of: Literal["dumo", "meanflow"] = "dumo"  # the objective of the training that follows
    times: Grid = Grid()  # the steps of the trajectories
    # A trajectory depends on its label, so labels cannot be dropped (our choice).
    drop: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _require_inner_points(self) -> "CMT":
        if self.times.steps < 2:
            raise ValueError("a trajectory of one step has no intermediate points: set times.steps=2, or more")
        return self

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        if self.of == "meanflow":
            trajectories = FromTeacher(velocity="no", points=self.times.steps)
            return Needs(inputs=("t", "r"), heads=("u",), teacher=trajectories)
        return Needs(inputs=("t",), heads=("v", "u"), teacher=FromTeacher(points=self.times.steps))

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the mean square of the head u for meanflow, and of both heads with DuMo's weights for dumo."""
        if self.of == "meanflow":
            (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
            u_loss = mean_square(u_hat - _mean_velocity(b, b.r))  # (1)
            return Terms(u_loss, {"u": u_loss})
        v_hat, u_hat = net(b.x_t, b.c, t=b.t)
        v_loss = mean_square(v_hat - b.v_t)  # (2)
        u_loss = mean_square(u_hat - _mean_velocity(b, 0 * b.t))  # (1), to the data
        return Terms(self.beta * v_loss + (1 - self.beta) * u_loss, {"v": v_loss, "u": u_loss})

    def readings(self, net: Net) -> Readings:
        """Return the readings of the objective `of`; for meanflow without a velocity, because r = t is not trained."""
        if self.of == "dumo":
            return DuMo().readings(net)
        return replace(mean_velocity(net), velocity=None)


def _mean_velocity(b: NoisyBatch, r: Time) -> Sample:
    """Return the mean velocity of each row's trajectory from t to r, as in (1); v_t if r = t."""
    is_velocity = lift(r == b.t, b.x_t)
    gap = lift(b.t - r, b.x_t).masked_fill(is_velocity, 1)
    x_r = b.on(r)
    return torch.where(is_velocity, b.v_t, (b.x_t - x_r) / gap)
