"""DuMo and distribution matching (DMD2, Yin et al. 2024, arXiv 2405.14867): a head replaces DMD2's fake-score network.

The network's samples x' are diffused with fresh noise z', and a head w learns their velocity, as v learns that of the
data:

    x'_t = t z' + (1 - t) x'                                                  (1)
    w* = z' - x'                                                              (2)
    V = w - v    at x'_t                                                      (3)

The score of a distribution diffused to t is -(x_t + (1 - t) v) / t, so V is opposite to the gradient with respect to x'
of KL(samples || data), both diffused to t. It vanishes if samples have the distribution of the data. DMD2 moves each
sample by V, divided by the mean distance of its row:

    x'* = sg(x' + V / m)    with    m = mean of |z' - x' - v| over the row    (4)

Diff-Instruct (Luo et al. 2023, arXiv 2305.18455) has no divisor. `dumo.objectives.dmd2` is DMD2 for pretrained
pipelines.

With `alpha`, samples minimize SiD's loss instead (Zhou et al. 2024, arXiv 2404.04057, `sid_loss.py`, for predictions
x_t - t v), which includes the dependence of w and v on the sample:

    t V / m (z' - x' - v - alpha V),    averaged over the row                 (5)

At alpha = 1 the last factor is z' - x' - w, and SIM (Luo et al. 2024, arXiv 2410.16794) replaces the divisor:

    t V / sqrt(|V|^2 + c^2) (z' - x' - w),    |V|^2 the mean over the row     (6)

Its gradient is that of the mean of sqrt(|V|^2 + c^2) with respect to w alone, at points x'_t that do not move: the mean
of h(x'_t) (z' - x' - w) over samples is zero for every function h, so its derivatives by x' and by w cancel. We derived
(6) for velocities; the factor t and c are our choice.
"""

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from dumo.objectives.base import (
    Needs,
    Net,
    Noise,
    NoisyBatch,
    Sample,
    Terms,
    Time,
    Uniform,
    descent_error,
    mean_square,
)
from dumo.objectives.dmd2 import Normalize, normalized, sid_loss
from dumo.objectives.pull import Pull

WEIGHT = 0.05  # of the samples' loss (our choice)
HEAD_WEIGHT = 0.3  # of the loss of w (our choice)


class Match(Pull):
    """DuMo's loss, a loss of the samples' velocity w, and a loss that moves samples by the difference w - v."""

    own_heads: ClassVar[tuple[str, ...]] = ("w",)
    kind: Literal["match"] = "match"
    normalize: Normalize = "distance"
    # alpha of (5): SiD uses 1.2, SIM 1. None means (4), the gradient of DMD2.
    alpha: float | None = Field(default=None, ge=0)

    @property
    def needs(self) -> Needs:
        """The needs of `Pull`, and the noise and time of x'_t (`dumo.objectives.twinflow` explains the fresh noise)."""
        return replace(super().needs, laws={"w.z": Noise(), "w.t": Uniform()}, diffuses_samples=True)

    def pull(self, net: Net, b: NoisyBatch, u: Sample) -> Terms:
        """Make one pass with gradients, or two with `alpha`."""
        t = b.drawn["w.t"].to(b.t)
        z = b.drawn["w.z"].to(b.z)
        x_t, w_star = b.path.at((b.z - u).detach(), z, t)  # (1) and (2)
        v, w = self._velocities(net, b, x_t, t)
        gap = (w - v).detach()  # (3)
        w_loss = mean_square(w - w_star)
        loss = HEAD_WEIGHT * w_loss
        if self.moves_samples(b):
            if self.alpha is None:
                move = normalized(gap, w_star - v, self.normalize)
                loss = loss + WEIGHT * mean_square(descent_error(u, move))  # (4)
            else:
                # The second pass has the same values. Subtracting the loss of the first pass cancels the gradient with
                # respect to the weights, and leaves the gradient with respect to the samples.
                x_moved, aim = b.path.at(b.z - u, z, t)
                v_moved, w_moved = self._velocities(net, b, x_moved, t)
                moved = sid_loss(self.alpha, w_moved, v_moved, aim, aim, self.normalize)
                still = sid_loss(self.alpha, w, v, w_star, w_star, self.normalize)
                loss = loss + WEIGHT * t * (moved - still)
        return Terms(loss, {"w": w_loss}, {"pull_w": mean_square(gap)})

    @staticmethod
    def _velocities(net: Net, b: NoisyBatch, x_t: Sample, t: Time) -> tuple[Sample, Sample]:
        """Return v and w, in the precision of the data, because their difference is small."""
        v, _, w = net(x_t, b.c, t=t)
        return v.to(x_t), w.to(x_t)
