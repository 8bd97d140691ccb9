"""alpha-Flow (Zhang et al. 2025, arXiv 2510.20771): from flow matching to MeanFlow, by a step that shrinks in training.

A step from t to r is alpha of the way along the velocity, then the rest as the net jumps it. With l = t - alpha (t - r)
and x_l = x_t - (t - l) v*,

    (t - r) u = (t - l) v* + (l - r) u_l    so    u* = alpha v* + (1 - alpha) u_l.

At alpha = 1 it is v*, on rows of r < t too: trajectory flow matching. As alpha vanishes so does the residual,
u - u* = alpha (u - v* + (l - r) (u - u_l) / (t - l)), whose bracket becomes MeanFlow's: it is in units of a velocity
whatever alpha, and is what this loss squares. Its floor is divided by alpha^2, and then the gradient is the authors'.

alpha is a number of the training's progress alone, the same for every rank: so it may decide which passes are made.
"""

from math import log, tanh
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from dumo.flow.guide import Guide, Interval
from dumo.flow.reading import mean_velocity
from dumo.flow.residual import adaptive_l2, clipped_share
from dumo.flow.slope import JvpSlope, Slope, earlier_mean_velocity, require_precise_passes
from dumo.flow.times import LogitNormal, Pair, Times
from dumo.runtime.bound import require_order
from dumo.types import Frozen, Needs, Net, Noised, Reads, Sample, Spec, Terms, lift, mean_square


class AlphaFlow(Spec):
    """Mean velocity from t to r, with a share of rows at r = t. Defaults: XL/2 of its `experiments-alphaflow.yaml`."""

    steep: ClassVar[float] = 25.0  # gamma
    snap: ClassVar[float] = 0.005  # alpha this near to 0 or 1 is that: clamp_value
    clip: ClassVar[float] = 4.0  # bound of u* where alpha > 0 and r < t: clamp_utgt
    floor: ClassVar[float] = 1e-3  # adaptive_loss_weight_eps
    kind: Literal["alpha_flow"] = "alpha_flow"
    times: Times = Pair(of=LogitNormal(mean=-0.4), flow=LogitNormal(mean=-0.4), velocity_ratio=0.5)
    drop: float = Field(default=0.1, ge=0, le=1)  # label_dropout
    guide: Guide = Guide(omega=0.2, zeta=0.92, interval=Interval(high=0.75))  # cfg_params; zeta is its kappa
    slope: Slope = JvpSlope()  # where alpha = 0: `_compute_mean_velocity_c`
    begin: float = Field(default=0.5, ge=0, le=1)  # of the training, when alpha leaves 1: 600k steps of 1.2M
    end: float = Field(default=5 / 6, ge=0, le=1)  # and when it has come to 0: 1M

    @property
    def gain(self) -> float:
        """How often the rounding of the net is multiplied."""
        return 1 / self.snap

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        return Needs(("t", "r"), ("u",), slope=self.slope, guide=self.guide, amplifies=self.gain, phases=self.phases)

    @property
    def phases(self) -> tuple[tuple[float, float], ...]:
        """Where steps cost alike: a progress with alpha = 1, one between, one with 0, and the share of each."""
        middle, width = (self.begin + self.end) / 2, self.end - self.begin
        half = min(width / 2, width / self.steep * log(1 / self.snap - 1))
        found = ((0.0, middle - half), (middle, 2 * half), (1.0, 1 - middle - half))
        return tuple((progress, share) for progress, share in found if share > 0)

    @model_validator(mode="after")
    def _possible(self) -> "AlphaFlow":
        require_order(begin=self.begin, end=self.end)
        return self

    def alpha(self, progress: float) -> float:
        """1 - sigmoid from `begin` to `end`, 1 before and 0 after, snapped at both ends (`get_ratio`)."""
        if not self.begin <= progress <= self.end:
            return 1.0 if progress < self.begin else 0.0
        middle, width = (self.begin + self.end) / 2, max(self.end - self.begin, 1e-9)
        alpha = 0.5 - 0.5 * tanh(self.steep * (progress - middle) / width / 2)  # 1 - sigmoid, without overflow
        return 0.0 if alpha < self.snap else 1.0 if alpha > 1 - self.snap else alpha

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """`AlphaFlowLoss.forward`; its gradient, row by row. Raises UserError where a short step meets bf16."""
        require_precise_passes(b, self.gain, self.kind)
        alpha, moves = self.alpha(b.progress), b.r < b.t
        with torch.no_grad():
            v_star = self.guide(b, None, lambda b, c: ref(b.x_t, c, t=b.t, r=b.t)[0])
        if alpha:
            (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
            off = (u_hat.detach() - self._far(ref, b, v_star, alpha)) / alpha
            u_star = torch.where(lift(moves, u_hat), u_hat.detach() - off, v_star)
        else:
            (u_hat,), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, toward=v_star, moving=b.moving)
            u_star = v_star - lift(b.t - b.r, b.x_t) * along(v_star)[0]
        e = u_hat - u_star
        floor = torch.full_like(b.t, self.floor).where(~moves, self.floor / (alpha or 1) ** 2)
        return Terms(adaptive_l2(e, 1.0, floor, mean=True), {"u": mean_square(e)}, {"clipped_share": clipped_share(e)})

    def _far(self, ref: Frozen, b: Noised, v_star: Sample, alpha: float) -> Sample:
        """u* for alpha > 0; no pass where alpha = 1, which goes all the way along v*."""
        u_star = alpha * v_star
        if alpha < 1:
            u_star = u_star + (1 - alpha) * earlier_mean_velocity(ref, b, v_star, alpha * (b.t - b.r))
        return u_star.clamp(-self.clip, self.clip)

    def read(self, net: Net) -> Reads:
        """One head, read at two times."""
        return mean_velocity(net)
