"""DuMo and distribution matching (DMD2, Yin et al. 2024, arXiv 2405.14867): a head replaces its second network.

The network's samples x' are diffused with fresh noise z', and a head w learns their velocity, as v learns the data's:

    x'_t = t z' + (1 - t) x'                                                  (1)
    w* = z' - x'                                                              (2)
    V = w - v    at x'_t                                                      (3)

The score of a distribution diffused to t is -(x_t + (1 - t) v) / t, so V is opposite to the gradient with respect to x'
of KL(samples || data), both diffused to t. It vanishes if samples have the distribution of the data. DMD2 divides it by
the mean of |z' - x' - v| over the row; we do not. `dumo.objectives.dmd2` is their method for pretrained pipelines.

With `alpha`, samples minimize SiD's loss instead (Zhou et al. 2024, arXiv 2404.04057, `sid_loss.py`, for predictions
x_t - t v), which includes the dependence of w and v on the sample:

    (w - v) (z' - x' - v) - alpha (w - v)^2,    averaged over the row         (4)
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

WEIGHT = 0.05  # of the samples' loss (our choice)
HEAD_WEIGHT = 0.3  # of the loss of w (our choice)
FLOOR = 1e-3  # of the divisor of SiD's loss (our choice)


class Match(Pull):
    """DuMo's loss, the velocity of its samples, and a loss of the samples by the difference of both velocities."""

    own_heads: ClassVar[tuple[str, ...]] = ("w",)
    kind: Literal["match"] = "match"
    # alpha of (4); SiD uses 1.2. None means (3), the gradient of DMD2.
    alpha: float | None = Field(default=None, ge=0)

    @property
    def needs(self) -> Needs:
        """The needs of `Pull`, and noise and time of x'_t (`dumo.objectives.twinflow` explains the fresh noise)."""
        return replace(super().needs, laws={"w.z": Noise(), "w.t": Uniform()}, diffuses_samples=True)

    def pull(self, net: Net, b: NoisyBatch, u: Sample) -> Terms:
        """Make one pass with gradients, or two with `alpha`."""
        t = b.drawn["w.t"].to(b.t)
        z = b.drawn["w.z"].to(b.z)
        x_t, w_star = b.path.at((b.z - u).detach(), z, t)  # (1) and (2)
        v, _, w = net(x_t, b.c, t=t)
        gap = (w - v).detach()  # (3)
        w_loss = mean_square(w - w_star)
        loss = HEAD_WEIGHT * w_loss
        if self.moves_samples(b):
            if self.alpha is None:
                loss = loss + WEIGHT * mean_square(descent_error(u, gap))
            else:
                # The second pass has the same values. Subtracting the loss of the first pass cancels the gradient with
                # respect to the weights, and leaves the gradient with respect to the samples.
                x_moved, aim = b.path.at(b.z - u, z, t)
                v_moved, _, w_moved = net(x_moved, b.c, t=t)
                moved = sid_loss(w_moved, v_moved, aim, self.alpha) - sid_loss(w, v, w_star, self.alpha)
                # SiD's loss, of predictions x_t - t v, is t^2 times (4), divided by their distance from x', t |w* - v|.
                distance = (w_star - v).detach().abs().flatten(1).mean(1).clamp(min=FLOOR)
                loss = loss + WEIGHT * t / distance * moved
        return Terms(loss, {"w": w_loss}, {"pull_w": mean_square(gap)})


def sid_loss(w: Sample, v: Sample, aim: Sample, alpha: float) -> PerSample:
    """Return SiD's loss (4) of each row at x'_t, (b,), with aim = z' - x'.

    If w is the velocity of the samples, the first product and (w - v)^2 have the same mean over noise. At alpha = 1/2,
    twice the gradient of this loss is that of the mean of (w - v)^2 over samples, including the change of w (ours).
    """
    gap = w - v
    return (gap * (aim - v - alpha * gap)).flatten(1).mean(1)
