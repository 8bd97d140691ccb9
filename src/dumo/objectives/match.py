"""DuMo and distribution matching (DMD2, Yin et al. 2024, arXiv 2405.14867): a head replaces its second net.

The net's own samples x' are diffused by fresh noise z'. There a head w learns their velocity, as v learns the data's:

    x'_t = t z' + (1 - t) x'                                                  (1)
    w* = z' - x'                                                              (2)
    V = w - v    at x'_t                                                      (3)

The score of a distribution diffused to t is -(x_t + (1 - t) v) / t, so V is against the gradient, by x', of
KL(samples || data), both diffused to t. It vanishes where samples are distributed as the data. DMD2 divides it by the
mean of |z' - x' - v| over the row; here its length counts (ours).

With `alpha` samples descend SiD's loss instead (Zhou et al. 2024, arXiv 2404.04057, `sid_loss.py`, of the guesses
x_t - t v). It sees how w and v change with the sample:

    (w - v) (z' - x' - v) - alpha (w - v)^2,    in mean over the row          (4)
"""

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from dumo.objectives.base import (
    Needs,
    Net,
    Noise,
    NoisyBatch,
    PerSample,
    Sample,
    Terms,
    Uniform,
    descent_error,
    mean_square,
)
from dumo.objectives.pull import Pull

WEIGHT = 0.05  # of the pull; ours
FIT = 0.3  # of w's own loss; ours
FLOOR = 1e-3  # the least distance by which SiD's loss of a row is divided; ours


class Match(Pull):
    """DuMo, the velocity of its samples, and the pull where both velocities differ."""

    own_heads: ClassVar[tuple[str, ...]] = ("w",)
    kind: Literal["match"] = "match"
    alpha: float | None = Field(default=None, ge=0)  # of (4), SiD's, who take 1.2; None: (3), the gradient of DMD2

    @property
    def needs(self) -> Needs:
        """The needs of `Pull`, and noise and time of x'_t (`dumo.objectives.twinflow` says why the noise is fresh)."""
        return replace(super().needs, laws={"w.z": Noise(), "w.t": Uniform()})

    def pull(self, net: Net, b: NoisyBatch, u: Sample) -> Terms:
        """One pass with gradients, with `alpha` two."""
        t = b.drawn["w.t"].to(b.t)
        z = b.drawn["w.z"].to(b.z)
        x_t, w_star = b.path.at((b.z - u).detach(), z, t)  # (1) and (2)
        v, _, w = net(x_t, b.c, t=t)
        gap = (w - v).detach()  # (3)
        w_loss = mean_square(w - w_star)
        loss = FIT * w_loss
        if self.moves_samples(b):
            if self.alpha is None:
                loss = loss + WEIGHT * mean_square(descent_error(u, gap))
            else:
                # The second pass has the same values; subtracting the first pass's loss cancels its gradient by the
                # weights and leaves the one by the samples.
                x_moved, aim = b.path.at(b.z - u, z, t)
                v_moved, _, w_moved = net(x_moved, b.c, t=t)
                moved = sid_loss(w_moved, v_moved, aim, self.alpha) - sid_loss(w, v, w_star, self.alpha)
                # SiD's is t^2 times (4), being of guesses x_t - t v, over their distance from x', t |w* - v|.
                distance = (w_star - v).detach().abs().flatten(1).mean(1).clamp(min=FLOOR)
                loss = loss + WEIGHT * t / distance * moved
        return Terms(loss, {"w": w_loss}, {"pull_w": mean_square(gap)})


def sid_loss(w: Sample, v: Sample, aim: Sample, alpha: float) -> PerSample:
    """SiD's loss (4) of each row at x'_t, (b,), with aim = z' - x'.

    Where w is the velocity of the samples, the first product and (w - v)^2 have the same mean over noise. At
    alpha = 1/2, twice the slope of this loss is that of the mean of (w - v)^2 over samples, with w's own change counted
    (ours).
    """
    gap = w - v
    return (gap * (aim - v - alpha * gap)).flatten(1).mean(1)
