"""UCGM (Sun et al. 2025, arXiv 2505.07447): a ratio interpolates between flow matching, 0, and consistency, 1.

The data f that a head F = u(x_t, t) predicts should be constant along the flow. Between t and s = ratio t, on the
straight line through data and noise, its rate of change is -e:

    f(x_t, t) = x_t - t F                                                                     (1)
    e = (f_s - f_t) / (t - s) = (F_t - ratio F_s) / (1 - ratio) - v*                          (2)
    e = (F_t - v*) + ratio / (1 - ratio) (F_t - F_s)        flow matching and self-alignment (the paper, Eq. 10)
    e = F_t + t dF/dt - v*        at ratio 1                                                  (3)

(3) is the limit of (2), and DuMo's residual. At ratio 0 the network is a velocity, and the loss is FM+, that of UCGM's
multi-step models.

Unlike DuMo, the authors clip e, and use a gain that increases with t, a Huber loss and a weight that decreases with t:

    F - u* = 4 t / sin(pi t / 2) clip(e)        at ratio 0: e                                 (4)
    loss = cos(pi t / 2) huber(F - u*)                                                        (5)

If the distribution of v* given x_t is skewed, these shift the fixed point (docs/objectives/details.md). Clipping and
gain apply at ratio > 0, the weight at every ratio. c of the Huber loss is `soft`; at 0 it is the root mean square.

At ratio 1, F is evaluated at t; the authors' code uses the mean of its values at t - h and t + h.
"""

from math import pi
from typing import ClassVar, Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    STRAIGHT,
    Beta,
    CentralSlope,
    Frozen,
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
    clipped_share,
    frozen,
    huber,
    jump_to_data,
    lift,
    mean_square,
    require_precise_passes,
)

HALF_PI = 1.57  # pi / 2 as the authors round it, so that the weight is not 0 at t = 1


class UCGM(ObjectiveSpec):
    """One head with one time.

    The defaults are from `configs/training_few_steps/in1k256_tit_xl_sdvae.yaml`, without its teacher, which provides
    guidance by extrapolation.
    """

    clip: ClassVar[float] = 1.0  # bound of e, at ratio > 0: `training_step`
    kind: Literal["ucgm"] = "ucgm"
    times: Times = Beta(a=0.8, b=1.0)  # time_dist_ctrl
    drop: float = Field(default=0.1, ge=0, le=1)  # lab_drop_ratio
    ratio: float = Field(default=1.0, ge=0, le=1)  # lambda: consistc_ratio
    slope: Slope = CentralSlope(h=0.005)  # at ratio 1: epsilo
    soft: float = Field(default=5.0, ge=0)  # c of the Huber loss: scaled_cbl_eps; 0 for FM+

    @property
    def gain(self) -> float:
        """The factor by which (2) amplifies the network's rounding error."""
        return 0.0 if self.ratio == 1 else self.ratio / (1 - self.ratio)

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        slope = self.slope if self.ratio == 1 else None
        return Needs(inputs=("t",), heads=(self._head,), slope=slope, amplifies=self.gain, formulas=STRAIGHT)

    @property
    def _head(self) -> str:
        """The name of the head: a velocity at ratio 0, otherwise the mean velocity to the data."""
        return "u" if self.ratio else "v"

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute `training_step` of `methods/unigen.py`.

        Raises UserError if the precision of the passes is too low for the gain.
        """
        u_hat, e = self.residual(net, b)
        with torch.no_grad():
            u_star = u_hat - self._scaled_error(e, b.t)  # (4)
        loss = huber(u_hat - u_star, self.soft) * torch.cos(HALF_PI * b.t)  # (5), weight_function
        return Terms(loss, {self._head: mean_square(e)}, {"clipped_share": clipped_share(e, self.clip)})

    def residual(self, net: Net, b: NoisyBatch) -> tuple[Sample, Sample]:
        """Return F, and e without gradients. F_s uses the weights in training, not theta^-."""
        frozen_net = frozen(net)
        if self.ratio == 1:
            (u_hat,), along = self.slope(net, frozen_net, b.x_t, b.c, t=b.t, direction=b.v_t)
            (du_dt,) = along(b.v_t)
            return u_hat, u_hat.detach() + lift(b.t, b.x_t) * du_dt - b.v_t  # (3)
        require_precise_passes(b, self.gain, self.kind)
        (u_hat,) = net(b.x_t, b.c, t=b.t)
        with torch.no_grad():
            if self.ratio == 0:
                return u_hat, u_hat - b.v_t
            x_s = b.x_t - lift((1 - self.ratio) * b.t, b.x_t) * b.v_t
            (u_s,) = frozen_net(x_s, b.c, t=self.ratio * b.t)
            return u_hat, (u_hat - self.ratio * u_s) / (1 - self.ratio) - b.v_t  # (2)

    def _scaled_error(self, e: Sample, t: Time) -> Sample:
        """Return F - u*: e, at ratio > 0 clipped and times 4 t / sin(pi t / 2), which is 8 / pi at t = 0."""
        if not self.ratio:
            return e
        e = e.clamp(-self.clip, self.clip)
        gain = 4 / (HALF_PI * torch.sinc(HALF_PI / pi * t))
        return lift(gain, e) * e

    def readings(self, net: Net) -> Readings:
        """Return the endpoint x_0 = x_t - t F, or the velocity at ratio 0."""
        if not self.ratio:
            return Readings(velocity=lambda x, t, c: net(x, c, t=t)[0])
        return Readings(endpoint=jump_to_data(net))
