"""sCT (Lu and Song 2025, arXiv 2410.11081): consistency in continuous time on the trigonometric path.

With theta = pi t / 2 the path is x_t = cos(theta) x + sin(theta) z, and the network predicts its direction f, which
gives the endpoint x_0. Along the flow x_0 is constant, so its derivative times cos(theta), with x' = dx_t/dtheta and
f' = df/dtheta, is 0:

    x_0 = cos(theta) x_t - sin(theta) f                                                       (1)
    g = -cos^2 (f - x') - sin cos (x_t + f')                                                  (2)

Otherwise f moves by g, which changes x_0 by -sin(theta) g. g is normalized in each row, and the rows are weighted. s is
learned with the network, so exp(s) converges to the mean of the term that it divides, and all times have equal weight
(its Sec. 4):

    f_next = f + g / (rms(g) + c)                                                             (3)
    loss = exp(-s) |f - f_next|^2 / tan(theta) + s                                            (4)

Unlike DuMo, there is one head on a special path, with a loss of the endpoint's derivative and without a velocity.

The method is designed for networks that are diffusion models already. Other networks become one in a long warm-up, in
which the term of (2) with f' increases. They learn better without normalization and weights
(docs/objectives/details.md).
"""

from math import pi
from typing import ClassVar, Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    Arctan,
    Cond,
    DualSlope,
    Formulas,
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
    lift,
    mean_square,
)

MIN_ANGLE = 1e-4  # radians; 1 / tan(theta) is clamped at this distance from both ends of the path, as in FastGen


class SCT(ObjectiveSpec):
    """The direction f of the trigonometric path, and the log variance of its error as a function of time."""

    floor: ClassVar[float] = 0.2  # c: its 0.1 for data of standard deviation 0.5, here 1
    kind: Literal["sct"] = "sct"
    times: Times = Arctan(mean=-1.0, std=1.4, sd=0.5)  # CIFAR-10, its Tab. 4
    drop: float = Field(default=0.0, ge=0, le=1)  # its CIFAR-10 has no labels
    slope: Slope = DualSlope()  # exact, as the jvp of its App. A
    # The share of the training in which sin cos (x_t + f') increases: 10k of 350k steps.
    warmup: float = Field(default=0.03, ge=0, le=1)
    # Weight rows as in (4); otherwise they have equal weight, and there is no s.
    weigh: bool = True

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        gauges = ("log_variance",) if self.weigh else ()
        formulas = Formulas(paths=("trig",), unit=True)
        scheduled = self.warmup > 0
        return Needs(
            inputs=("t",), heads=("f",), gauges=gauges, formulas=formulas, slope=self.slope, scheduled=scheduled
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute its Alg. 1."""
        (f_hat, *gauges), along = self.slope(net, ref, b.x_t, b.c, t=b.t, direction=b.v_t)
        with torch.no_grad():
            df_dt, *_ = along(b.v_t)
            g = self._tangent(b, f_hat, df_dt)
            f_star = f_hat + g
            f_next = f_hat + g / lift(mean_square(g).sqrt() + self.floor, g)  # (3)
        f_loss = mean_square(f_hat - f_next)
        parts = {"f": mean_square(f_hat - f_star)}
        if not self.weigh:
            return Terms(f_loss, parts)
        (log_variance,) = gauges
        theta = (b.t * pi / 2).clamp(MIN_ANGLE, pi / 2 - MIN_ANGLE)
        loss = (-log_variance).exp() * f_loss / theta.tan() + log_variance  # (4)
        return Terms(loss, parts, {"log_variance": log_variance.detach()})

    def _tangent(self, b: NoisyBatch, f: Sample, df_dt: Sample) -> Sample:
        """Compute (2), cos(theta) dx_0/dtheta. In the warm-up, the weight of the term with f' increases to 1."""
        weight = min(1.0, b.progress / self.warmup) if self.warmup else 1.0
        theta = lift(b.t * pi / 2, f)
        dt_dtheta = 2 / pi
        cos = theta.cos()
        sin = theta.sin()
        return -cos * (cos * (f - dt_dtheta * b.v_t) + weight * sin * (b.x_t + dt_dtheta * df_dt))

    def readings(self, net: Net) -> Readings:
        """Return the endpoint."""

        def endpoint(x: Sample, t: Time, c: Cond) -> Sample:
            f = net(x, c, t=t)[0]
            theta = lift(t * pi / 2, x)
            return theta.cos() * x - theta.sin() * f  # (1)

        return Readings(endpoint=endpoint)
