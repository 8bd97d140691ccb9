"""CMT (Hu et al. 2025, arXiv 2509.24526): mid-training, on trajectories that a teacher's solver has gone.

Points x_t of one trajectory, from noise z to the data x_0 that the solver makes of it, are all known. So is every mean
velocity between two of them, and no derivative is asked for:

    u(x_t, t, r) = (x_t - x_r) / (t - r),        v(x_t, t) = V(x_t, t), the teacher's.

It stands between the teacher and the training that is meant: a net that begins there knows long jumps already. `of`
says for which: consistency, whose loss is of D = x_t - t u against x_0; meanflow, of u; dumo (ours), of both heads.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.reading import jump_to_data, mean_velocity
from dumo.flow.times import Grid
from dumo.objectives.dumo import DuMo
from dumo.types import Frozen, Needs, Net, Noised, Reads, Sample, Spec, Terms, Time, lift, mean_square


class CMT(Spec):
    """What the net of another objective is before its training: regression on a teacher's trajectories."""

    kind: Literal["cmt"] = "cmt"
    of: Literal["consistency", "dumo", "meanflow"] = "dumo"
    times: Grid = Grid()  # the steps of the trajectories
    drop: float = Field(default=0.0, ge=0, le=1)  # ours: a trajectory is of its label
    beta: float = Field(default=0.7, ge=0, le=1)  # weight of the velocity where there is one, as DuMo

    @model_validator(mode="after")
    def _between(self) -> "CMT":
        if self.times.steps < 2:
            raise ValueError("a trajectory of one step has no points between its ends: set times.steps=2, or more")
        return self

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        two = self.of == "dumo"
        return Needs(
            inputs=("t", "r") if self.of == "meanflow" else ("t",),
            heads=("v", "u") if two else ("u",),
            points=self.times.steps,
            teachable=two,
        )

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Its losses of CM and of MF in mean squares, for the LPIPS of the first; both heads as DuMo weighs them."""
        r = b.r if self.of == "meanflow" else 0 * b.t
        *v_hat, u_hat = net(b.x_t, b.c, t=b.t, **({"r": r} if self.of == "meanflow" else {}))
        u_loss = mean_square(u_hat - chord(b, r))
        if self.of == "consistency":
            return Terms(b.t**2 * u_loss, {"u": u_loss})
        if self.of == "meanflow":
            return Terms(u_loss, {"u": u_loss})
        v_loss = mean_square(v_hat[0] - b.v_t)
        return Terms(self.beta * v_loss + (1 - self.beta) * u_loss, {"v": v_loss, "u": u_loss})

    def read(self, net: Net) -> Reads:
        """As the objective that it is for; of one head no velocity, for r = t is not taught."""
        if self.of == "dumo":
            return DuMo().read(net)
        return (
            Reads(endpoint=jump_to_data(net))
            if self.of == "consistency"
            else replace(mean_velocity(net), velocity=None)
        )


def chord(b: Noised, r: Time) -> Sample:
    """The mean velocity of each row's trajectory from t down to r, and v_t where r = t."""
    same = lift(r == b.t, b.x_t)
    return torch.where(same, b.v_t, (b.x_t - b.on(r)) / lift(b.t - r, b.x_t).masked_fill(same, 1))
