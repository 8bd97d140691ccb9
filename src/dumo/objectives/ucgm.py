"""UCGM (Sun et al. 2025, arXiv 2505.07447): one ratio leads from flow matching, 0, to consistency, 1.

The data that a head F = u(x_t, t) points to, f(x_t, t) = x_t - t F, should not change along the flow. Between t and
ratio t, on the straight line through data and noise, f changes at the rate

    df/dt  is about  (f_t - f_(ratio t)) / (t - ratio t) = v* - (F_t - ratio F_(ratio t)) / (1 - ratio) =: -e

and e = (F_t - v*) + ratio / (1 - ratio) (F_t - F_(ratio t)): flow matching and self-alignment (the paper, Eq. 10). As
the ratio tends to 1 so does e to F_t + t dF/dt - v*, DuMo's residual, which it is at 1. At 0 the net is a velocity, and
this is the loss, FM+, from which the multi-step nets of UCGM come.

On top of e the authors put a bound, a gain that grows with t, a Huber loss and a weight that falls with t. Where the
law of v* given x_t is skewed these move the fixed point off the flow (docs/objectives/ucgm.md). Each may be left out;
without all of them the loss is the mean square of e.

At ratio 1 F is taken at t, where the authors' code has the mean of its values at t - h and t + h.
"""

from math import pi
from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.guide import Guide
from dumo.flow.reading import jump_to_data
from dumo.flow.residual import clipped_share, huber, turned
from dumo.flow.secant import demand
from dumo.flow.slope import CentralSlope, Slope
from dumo.flow.times import Beta, Times
from dumo.types import Frozen, Needs, Net, Noised, Reads, Sample, Spec, Terms, Time, frozen, lift, mean_square

QUARTER = 1.57  # pi / 2 as the authors round it: so the weight is not quite 0 at t = 1


class UCGM(Spec):
    """One head of one time. Defaults: `configs/training_few_steps/in1k256_tit_xl_sdvae.yaml`, less its teacher.

    That guides there, going past it by 2: the run's `teacher`, with mix = 2. A guide of its own needs a velocity, which
    the net is at ratio = 0 alone.
    """

    kind: Literal["ucgm"] = "ucgm"
    times: Times = Beta(a=0.8, b=1.0)  # time_dist_ctrl
    drop: float = Field(default=0.1, ge=0, le=1)  # lab_drop_ratio
    ratio: float = Field(default=1.0, ge=0, le=1)  # lambda: consistc_ratio
    guide: Guide = Guide()  # none; at ratio 0 the preset ucgm, with an average of 0.999 as theta^-
    slope: Slope = CentralSlope(h=0.005)  # at ratio 1: epsilo
    clip: float | None = Field(default=1.0, gt=0)  # bound of e, at ratio > 0
    gain: bool = True  # u* = F - 4 t / sin(pi t / 2) e, at ratio > 0
    soft: float | None = Field(default=5.0, ge=0)  # c of the Huber loss: scaled_cbl_eps, 0 for FM+; None: plain l2
    cosine: bool = False  # the angle over channels counts, too: wt_cosine_loss, true for FM+
    fall: bool = True  # weight cos(pi t / 2): weight_function

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, at ratio 0 a velocity, and the loss takes."""
        derives, heads = self.ratio == 1, ("u",) if self.ratio else ("v",)
        amplifies = 0.0 if derives else self.ratio / (1 - self.ratio)
        ref = 0.999 if self.guide.active else None  # FM+ asks it for V(null)
        return Needs(("t",), heads, slope=self.slope, derives=derives, guide=self.guide, amplifies=amplifies, ref=ref)

    @model_validator(mode="after")
    def _guided(self) -> "UCGM":
        if self.guide.active and self.ratio:
            raise ValueError(
                f"guide asks the net for a velocity, which at ratio = {self.ratio:g} it is not: guide by a teacher, "
                "with guide.omega=1 and guide.zeta=0, or set ratio=0"
            )
        if self.soft is not None or self.cosine:
            self.guide.demand_l2("the loss is no plain square", "soft=null and cosine=false")
        return self

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """`training_step` of `methods/unigen.py`. Raises UserError where a short step meets bf16."""
        u_hat, off = self._off(net, ref, b)
        with torch.no_grad():
            u_star = u_hat - self._pull(off, b.t)
        e = u_hat - u_star
        loss = mean_square(e) if self.soft is None else huber(e, self.soft)
        loss = loss + turned(u_hat, u_star) if self.cosine else loss
        loss = loss * torch.cos(QUARTER * b.t) if self.fall else loss
        return Terms(
            loss, {self.needs.heads[0]: mean_square(off)}, {"clipped_share": clipped_share(off, self.clip or 1.0)}
        )

    def _off(self, net: Net, ref: Frozen, b: Noised) -> tuple[Sample, Sample]:
        """F and, without gradients, e. Guidance asks theta^-; F is aligned with the weights in training."""
        now = frozen(net)
        if self.ratio == 1:
            (u_hat,), along = self.slope(net, now, b.x_t, b.c, t=b.t, toward=b.v_t)
            (du_dt,) = along(b.v_t)
            return u_hat, u_hat.detach() + lift(b.t, b.x_t) * du_dt - b.v_t
        demand(b, self.needs.amplifies, self.kind)
        (u_hat,) = net(b.x_t, b.c, t=b.t)
        with torch.no_grad():
            if self.ratio == 0:
                return u_hat, u_hat - self.guide(b, u_hat, lambda b, c: ref(b.x_t, c, t=b.t)[0])
            x_s = b.x_t - lift((1 - self.ratio) * b.t, b.x_t) * b.v_t
            (u_s,) = now(x_s, b.c, t=self.ratio * b.t)
            return u_hat, (u_hat - self.ratio * u_s) / (1 - self.ratio) - b.v_t

    def _pull(self, off: Sample, t: Time) -> Sample:
        """F - u*: e, at ratio > 0 within its bound and with its gain, 4 t / sin(pi t / 2), which is 8 / pi at t = 0."""
        if not self.ratio:
            return off
        off = off if self.clip is None else off.clamp(-self.clip, self.clip)
        return lift(4 / (QUARTER * torch.sinc(QUARTER / pi * t)), off) * off if self.gain else off

    def read(self, net: Net) -> Reads:
        """The jump to the data, x_0 = x_t - t F; at ratio 0 the slope of the path."""
        if not self.ratio:
            return Reads(velocity=lambda x, t, c: net(x, c, t=t)[0])
        return Reads(endpoint=jump_to_data(net))
