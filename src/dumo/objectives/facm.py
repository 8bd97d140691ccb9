"""FACM (Peng et al. 2025, arXiv 2507.03738): a continuous consistency model, anchored by flow matching in its head.

The network has one head and one time, which is t for the flow map u = (x_t - x_0) / t, and -t for the velocity v: in
"expanded time" the two tasks are one function on [-1, 1], continuous at t = 0, where u = v. Unlike DuMo's two heads of
one pass, each task has its own pass, on every row:

    v(x_t, -t)* = v*                                            the anchor                        (1)
    u + t du/dt = v        so        u* = v* - t du/dt                                            (2)

The target of the flow map is a step of length alpha(t) towards u*, with the error clipped to [-1, 1]. Rows have an
adaptive weight and sin(pi t / 2):

    u_next = u - alpha(t) clip(u - u*),        alpha(t) = 1 - sqrt(1 - t)                         (3)
    loss = |v - v*|^2 + (1 - cos(v, v*)) + sin(pi t / 2) adaptive_l2(u - u_next)                     (4)
"""

from math import pi
from typing import ClassVar, Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    Arctan,
    DualSlope,
    Frozen,
    Guide,
    Interval,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Slope,
    Terms,
    Time,
    Times,
    adaptive_l2,
    clipped_share,
    cosine_distance,
    jump_to_data,
    lift,
    mean_square,
)


class FACM(ObjectiveSpec):
    """Velocity and flow map of one head, selected by the sign of the time. Defaults are the authors' (`losses.py`)."""

    power: ClassVar[float] = 0.5  # p of the adaptive weight of u
    floor: ClassVar[float] = 1e-3  # c of the adaptive weight of u
    kind: Literal["facm"] = "facm"
    times: Times = Arctan(mean=-0.8, std=1.6, sd=1.0)
    drop: float = Field(default=0.1, ge=0, le=1)  # our choice, to train V(null), which their teacher provides
    guide: Guide = Guide(omega=1.75, interval=Interval(high=0.875))  # without a teacher
    slope: Slope = DualSlope()
    # The bound of the error; None disables clipping.
    clip: float | None = Field(default=1.0, gt=0)
    # Add the cosine distance over channels to the anchor; it has no effect for one channel.
    cosine: bool = True

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        return Needs(inputs=("t",), heads=("u",), signed=True, slope=self.slope, guide=self.guide)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Make two passes with gradients: the anchor at -t, then the flow map at t."""
        (v_hat,) = net(b.x_t, b.c, t=-b.t)
        with torch.no_grad():
            v_star = self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=-b.t)[0])
        (u_hat,), along = self.slope(net, ref, b.x_t, b.c, t=b.t, direction=v_star)
        with torch.no_grad():
            (du_dt,) = along(v_star)
            u_star = v_star - lift(b.t, b.x_t) * du_dt  # (2)
            u_next = u_hat - self._step(u_hat - u_star, b.t)  # (3)
        u_error = u_hat - u_star
        v_loss = mean_square(v_hat - v_star)  # (1)
        anchor = v_loss + cosine_distance(v_hat, v_star) if self.cosine else v_loss
        u_loss = adaptive_l2(u_hat - u_next, self.power, self.floor, mean=True)
        loss = anchor + (pi / 2 * b.t).sin() * u_loss  # (4)
        parts = {"v": v_loss, "u": mean_square(u_error)}
        return Terms(loss, parts, {"clipped_share": clipped_share(u_error, self.clip or 1.0)})

    def _step(self, error: Sample, t: Time) -> Sample:
        """Return the step of u towards its target: alpha(t) times the clipped error."""
        if self.clip is not None:
            error = error.clamp(-self.clip, self.clip)
        alpha = 1 - (1 - t).sqrt()
        return lift(alpha, error) * error

    def readings(self, net: Net) -> Readings:
        """Return the velocity at -t, and the endpoint x_0 = x_t - t u at t."""
        return Readings(velocity=lambda x, t, c: net(x, c, t=-t)[0], endpoint=jump_to_data(net))
