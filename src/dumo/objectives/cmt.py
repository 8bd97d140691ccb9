"""CMT (Hu et al. 2025, arXiv 2509.24526): mid-training, on trajectories that a teacher's solver has made.

The solver goes from noise z to data x_0, and all points x_t of its trajectory are kept. So the mean velocity between
any two of them is known. V is the teacher's velocity:

    u(x_t, t, r)* = (x_t - x_r) / (t - r)                                                     (1)
    v(x_t, t)* = V(x_t, t)                                                                    (2)

Unlike DuMo, no derivative is taken. Mid-training comes between the teacher's training and that by another objective,
which then begins with a net that knows long jumps. The field `of` names that objective: meanflow, whose net has the
head u, or dumo (ours), whose net has v and u.
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
    """Regression on a teacher's trajectories, before the net is trained by another objective."""

    beta: ClassVar[float] = 0.7  # weight of the velocity where there is one, as DuMo
    kind: Literal["cmt"] = "cmt"
    of: Literal["dumo", "meanflow"] = "dumo"  # the objective that the net is trained by afterwards
    times: Grid = Grid()  # the steps of the trajectories
    drop: float = Field(default=0.0, ge=0, le=1)  # ours: a trajectory is of its label, so data with labels need 0

    @model_validator(mode="after")
    def _require_inner_points(self) -> "CMT":
        if self.times.steps < 2:
            raise ValueError("a trajectory of one step has no points between its ends: set times.steps=2, or more")
        return self

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and what else the loss needs."""
        if self.of == "meanflow":
            trajectories = FromTeacher(velocity="no", points=self.times.steps)
            return Needs(inputs=("t", "r"), heads=("u",), teacher=trajectories)
        return Needs(inputs=("t",), heads=("v", "u"), teacher=FromTeacher(points=self.times.steps))

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Mean squares: of the head u alone for meanflow; of both heads, weighed as DuMo weighs them, for dumo."""
        if self.of == "meanflow":
            (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
            u_loss = mean_square(u_hat - _mean_velocity(b, b.r))  # (1)
            return Terms(u_loss, {"u": u_loss})
        v_hat, u_hat = net(b.x_t, b.c, t=b.t)
        v_loss = mean_square(v_hat - b.v_t)  # (2)
        u_loss = mean_square(u_hat - _mean_velocity(b, 0 * b.t))  # (1), down to the data
        return Terms(self.beta * v_loss + (1 - self.beta) * u_loss, {"v": v_loss, "u": u_loss})

    def readings(self, net: Net) -> Readings:
        """Read the net as the objective `of` does; of meanflow's without a velocity, because r = t is not taught."""
        if self.of == "dumo":
            return DuMo().readings(net)
        return replace(mean_velocity(net), velocity=None)


def _mean_velocity(b: NoisyBatch, r: Time) -> Sample:
    """The mean velocity of each row's trajectory from t down to r, as in (1); v_t where r = t."""
    at_rest = lift(r == b.t, b.x_t)
    gap = lift(b.t - r, b.x_t).masked_fill(at_rest, 1)
    x_r = b.on(r)
    return torch.where(at_rest, b.v_t, (b.x_t - x_r) / gap)
