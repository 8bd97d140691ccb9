"""sCT (Lu and Song 2025, arXiv 2410.11081): consistency in continuous time on the trigonometric path.

With theta = pi t / 2 the path is x_t = cos(theta) x + sin(theta) z, and the net gives a direction f on its circle: the
point that it began at is

    x_0 = cos(theta) x_t - sin(theta) f

Along the flow x_0 rests. Its derivative, with x' = dx_t/dtheta and f' = df/dtheta, times cos(theta):

    g = -cos^2 (f - x') - sin cos (x_t + f')        is 0

and where it is not, f is pulled by g, which moves x_0 by -sin(theta) g. The pull is made about as long for every row,
g / (rms(g) + c), and the rows are weighed by exp(-s) / tan(theta), where s is learned with the net, with + s in the
loss: so its exp settles at the mean of what it divides, and all times count alike (its Sec. 4).

All this is for a net that is a diffusion model already. One that is none is first made one by a long warm-up, in which
the part with f' grows, and learns better from g as it is, all rows alike (docs/objectives/details.md).
"""

from math import pi
from typing import ClassVar, Literal

import torch
from pydantic import Field

from dumo.flow.slope import JvpSlope, Slope
from dumo.flow.times import Arctan, Times
from dumo.types import Cond, Formulas, Frozen, Needs, Net, Noised, Reads, Sample, Spec, Terms, Time, lift, mean_square

EDGE = 1e-4  # radians from both ends of the path where 1 / tan(theta) is held; of FastGen's `sCM.py`, at pi / 2


class SCT(Spec):
    """The direction f on the circle that x_t lies on, and the log of its error's variance, by time."""

    floor: ClassVar[float] = 0.2  # c: its 0.1 for data of standard deviation 0.5, here 1
    kind: Literal["sct"] = "sct"
    times: Times = Arctan(mean=-1.0, std=1.4, sd=0.5)  # CIFAR-10, its Tab. 4
    drop: float = Field(default=0.0, ge=0, le=1)  # its CIFAR-10 has no labels
    slope: Slope = JvpSlope()  # its App. A
    warmup: float = Field(default=0.03, ge=0, le=1)  # share of training in which sin cos (x_t + f') grows: 10k of 350k
    weigh: bool = True  # rows by exp(-s) / tan(theta); else all alike, and no s

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        gauges = ("log_variance",) if self.weigh else ()
        formulas = Formulas(paths=("trig",), unit=True)
        return Needs(inputs=("t",), heads=("f",), gauges=gauges, formulas=formulas, slope=self.slope)

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """Its Alg. 1."""
        (f_hat, *gauges), along = self.slope(net, ref, b.x_t, b.c, t=b.t, toward=b.v_t)
        with torch.no_grad():
            df_dt, *_ = along(b.v_t)
            g = self.tangent(b, f_hat, df_dt)
            f_star, f_next = f_hat + g, f_hat + g / lift(mean_square(g).sqrt() + self.floor, g)
        pull, parts = mean_square(f_hat - f_next), {"f": mean_square(f_hat - f_star)}
        if not self.weigh:
            return Terms(pull, parts)
        (log_variance,) = gauges
        theta = (b.t * pi / 2).clamp(EDGE, pi / 2 - EDGE)
        loss = (-log_variance).exp() * pull / theta.tan() + log_variance
        return Terms(loss, parts, {"log_variance": log_variance.detach()})

    def tangent(self, b: Noised, f: Sample, df_dt: Sample) -> Sample:
        """cos(theta) dx_0/dtheta, the part with f' grown to a share of what it is."""
        grown = min(1.0, b.progress / self.warmup) if self.warmup else 1.0
        theta, slow = lift(b.t * pi / 2, f), 2 / pi  # d/dtheta = slow d/dt
        cos, sin = theta.cos(), theta.sin()
        return -cos * (cos * (f - slow * b.v_t) + grown * sin * (b.x_t + slow * df_dt))

    def read(self, net: Net) -> Reads:
        """The point where the circle began."""

        def endpoint(x: Sample, t: Time, c: Cond) -> Sample:
            theta = lift(t * pi / 2, x)
            return theta.cos() * x - theta.sin() * net(x, c, t=t)[0]

        return Reads(endpoint=endpoint)
