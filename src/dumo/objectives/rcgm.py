"""RCGM (Sun et al. 2025, from the code of TwinFlow, arXiv 2512.05150): a mean velocity from a short step and N jumps.

The network learns the mean velocity u from t to r. The target is the end of a path of two parts: an Euler step of
length h along the velocity v* of the data, from t to s = t - h, and N equal jumps of the network from s to r. With the
mean velocities u_i of these jumps,

    I = sum of (t_i - t_(i+1)) u_i                                                            (1)
    (t - r) u = h v* + I                                                                      (2)
    u - u* = ((t - r) u - I) / h - v*                                                         (3)

(3) is (2) in units of a velocity. As h vanishes, it becomes MeanFlow's u + (t - r) du/dt - v* for any N. N = 1 is
SoFlow with a step of fixed length, and a larger N splits the long jump into shorter ones. If t - r < h, u* = v*.

Unlike DuMo, it has one head with two times, no derivative, and a bound on u - u*.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    Below,
    Frozen,
    Guide,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Terms,
    Times,
    Uniform,
    clipped_share,
    lift,
    mean_square,
    mean_velocity,
    require_precise_passes,
)
from dumo.runtime.limits import BLOCKS


class RCGM(ObjectiveSpec):
    """Mean velocity from t to r, with N jumps of theta^-. The defaults are those of TwinFlow's `tutorials/mnist`."""

    # Whether the network also gets negative times.
    signed: ClassVar[bool] = False
    # The length h of the step along v*.
    step: ClassVar[float] = 0.01
    # The bound on each entry of u - u*.
    clip: ClassVar[float] = 1.0
    kind: Literal["rcgm"] = "rcgm"
    times: Times = Below(of=Uniform())  # prepare_inputs
    # Our choice: the tutorial shuffles labels instead of dropping them.
    drop: float = Field(default=0.1, ge=0, le=1)
    # enhanced_ratio of the tutorial; its text-to-image configs have 0.8, and two of them 4.0.
    guide: Guide = Guide(zeta=0.5)
    # The number N of jumps (estimate_order). For N = 1 theta^- is the network itself, else an EMA with decay 0.99.
    order: int = Field(default=2, ge=1, le=BLOCKS)

    @property
    def gain(self) -> float:
        """Return the largest factor by which (3) amplifies rounding errors of the network."""
        return 1 / self.step

    @property
    def needs(self) -> Needs:
        """Declare the network's inputs and heads, and what else the loss needs."""
        ref = 0.99 if self.order > 1 else None
        return Needs(
            inputs=("t", "r"), heads=("u",), signed=self.signed, guide=self.guide, amplifies=self.gain, ref=ref
        )

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the loss of `get_rcgm_target` in `methodes.py`. Raises UserError if the precision is too low."""
        require_precise_passes(b, self.gain, self.kind)
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        error, unclipped_error = self._residual(u_hat, ref, b, self._v_star(ref, b))
        u_loss = mean_square(error)
        return Terms(u_loss, {"u": u_loss}, {"clipped_share": clipped_share(unclipped_error, self.clip)})

    @torch.no_grad()
    def _v_star(self, ref: Frozen, b: NoisyBatch, v_hat: Sample | None = None) -> Sample:
        """Return the guided velocity at x_t. v_hat is the velocity of theta^-, if it is already computed."""
        return self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t, r=b.t)[0])

    def _residual(self, u_hat: Sample, ref: Frozen, b: NoisyBatch, v_star: Sample) -> tuple[Sample, Sample]:
        """Return the clipped error u - u*, with gradients through u_hat only, and the unclipped error, detached."""
        with torch.no_grad():
            gap = lift(b.t - b.r, b.x_t)
            unclipped_error = (gap * u_hat - self._displacement(ref, b, v_star)) / self.step - v_star  # (3)
            unclipped_error = torch.where(gap < self.step, u_hat - v_star, unclipped_error)
            u_star = u_hat - unclipped_error.clamp(-self.clip, self.clip)
        return u_hat - u_star, unclipped_error

    def _displacement(self, ref: Frozen, b: NoisyBatch, v_star: Sample) -> Sample:
        """Return I of (1), from max(t - h, r) to r in N jumps."""
        start = b.x_t - self.step * v_star
        x = start
        t_i = torch.maximum(b.t - self.step, b.r)
        jump = (t_i - b.r) / self.order
        for _ in range(self.order):
            t_next = torch.maximum(t_i - jump, b.r)
            (u_i,) = ref(x, b.c, t=t_i, r=t_next)
            x = x - lift(t_i - t_next, x) * u_i
            t_i = t_next
        return start - x

    def readings(self, net: Net) -> Readings:
        """Return the mean velocity from t to r."""
        return mean_velocity(net, times=self.times)
