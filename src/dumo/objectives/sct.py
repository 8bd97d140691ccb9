"""sCT (Lu and Song 2025, arXiv 2410.11081): consistency in continuous time on the trigonometric path.

With theta = pi t / 2 the path is x_t = cos(theta) x + sin(theta) z, and the net gives a direction f on its circle: the
point that it began at is x_0. Along the flow x_0 rests, so its derivative, with x' = dx_t/dtheta and f' = df/dtheta,
times cos(theta), is 0:

    x_0 = cos(theta) x_t - sin(theta) f                                                       (1)
    g = -cos^2 (f - x') - sin cos (x_t + f')                                                  (2)

Where it is not, f is pulled by g, which moves x_0 by -sin(theta) g. The pull is made about as long for every row, and
the rows are weighed. Here s is learned with the net, so its exp settles at the mean of what it divides, and all times
count alike (its Sec. 4):

    f_next = f + g / (rms(g) + c)                                                             (3)
    loss = exp(-s) |f - f_next|^2 / tan(theta) + s                                            (4)

Unlike DuMo: one head on a path of its own, whose loss is of the endpoint's derivative; no velocity is learned apart.

All this is for a net that is a diffusion model already. Any other net becomes one in a long warm-up, in which the part
of (2) with f' grows. It learns better from g as it is, with all rows alike (docs/objectives/details.md).
"""

from math import pi
from typing import ClassVar, Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    Arctan,
    Cond,
    Formulas,
    Frozen,
    JvpSlope,
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

EDGE = 1e-4  # radians from both ends of the path where 1 / tan(theta) is held; of FastGen's `sCM.py`, at pi / 2


class SCT(ObjectiveSpec):
    """The direction f on the circle that x_t lies on, and the log of its error's variance, by time."""

    floor: ClassVar[float] = 0.2  # c: its 0.1 for data of standard deviation 0.5, here 1
    kind: Literal["sct"] = "sct"
    times: Times = Arctan(mean=-1.0, std=1.4, sd=0.5)  # CIFAR-10, its Tab. 4
    drop: float = Field(default=0.0, ge=0, le=1)  # its CIFAR-10 has no labels
    slope: Slope = JvpSlope()  # its App. A
    warmup: float = Field(default=0.03, ge=0, le=1)  # share of training in which sin cos (x_t + f') grows: 10k of 350k
    weigh: bool = True  # rows as in (4); else all alike, and no s

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and what else the loss needs."""
        gauges = ("log_variance",) if self.weigh else ()
        formulas = Formulas(paths=("trig",), unit=True)
        scheduled = self.warmup > 0
        return Needs(
            inputs=("t",), heads=("f",), gauges=gauges, formulas=formulas, slope=self.slope, scheduled=scheduled
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Its Alg. 1."""
        (f_hat, *gauges), along = self.slope(net, ref, b.x_t, b.c, t=b.t, toward=b.v_t)
        with torch.no_grad():
            df_dt, *_ = along(b.v_t)
            g = self._tangent(b, f_hat, df_dt)
            f_star = f_hat + g
            f_next = f_hat + g / lift(mean_square(g).sqrt() + self.floor, g)  # (3)
        pull = mean_square(f_hat - f_next)
        parts = {"f": mean_square(f_hat - f_star)}
        if not self.weigh:
            return Terms(pull, parts)
        (log_variance,) = gauges
        theta = (b.t * pi / 2).clamp(EDGE, pi / 2 - EDGE)
        loss = (-log_variance).exp() * pull / theta.tan() + log_variance  # (4)
        return Terms(loss, parts, {"log_variance": log_variance.detach()})

    def _tangent(self, b: NoisyBatch, f: Sample, df_dt: Sample) -> Sample:
        """(2), cos(theta) dx_0/dtheta. In the warm-up the part with f' has a weight that grows to 1."""
        weight = min(1.0, b.progress / self.warmup) if self.warmup else 1.0
        theta = lift(b.t * pi / 2, f)
        dt_dtheta = 2 / pi
        cos = theta.cos()
        sin = theta.sin()
        return -cos * (cos * (f - dt_dtheta * b.v_t) + weight * sin * (b.x_t + dt_dtheta * df_dt))

    def readings(self, net: Net) -> Readings:
        """The point where the circle began."""

        def endpoint(x: Sample, t: Time, c: Cond) -> Sample:
            f = net(x, c, t=t)[0]
            theta = lift(t * pi / 2, x)
            return theta.cos() * x - theta.sin() * f  # (1)

        return Readings(endpoint=endpoint)
