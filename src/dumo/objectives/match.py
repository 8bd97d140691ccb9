"""DuMo and distribution matching (DMD2, Yin et al. 2024, arXiv 2405.14867): a head replaces its second net.

The head w learns the velocity of the net's own samples x', diffused by fresh noise z' to x'_t = t z' + (1 - t) x', as v
learns that of the data. The score of a law diffused to t is -(x_t + (1 - t) v) / t, so

    V = w - v    at x'_t

is along the gradient, by x', of KL(samples || data), both diffused to t. V vanishes where samples have the data's law.
DMD2 divides it by the mean of |z' - x' - v| over the row; here its length counts (ours).

With `alpha` samples descend SiD's loss instead (`identity`), whose slope sees how w and v change with the sample.
"""

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from dumo.flow.draw import Noise
from dumo.flow.residual import descent_error
from dumo.flow.times import Uniform
from dumo.objectives.pull import Pull
from dumo.types import Needs, Net, Noised, PerSample, Sample, Terms, mean_square

WEIGHT, FIT = 0.05, 0.3  # of the pull, and of w's own loss; ours
FLOOR = 1e-3  # the least distance by which SiD's loss of a row is divided; ours


class Match(Pull):
    """DuMo, the velocity of its samples, and the pull where both velocities differ."""

    own: ClassVar[tuple[str, ...]] = ("w",)
    kind: Literal["match"] = "match"
    alpha: float | None = Field(default=None, ge=0)  # SiD's, who take 1.2; None: the gradient of DMD2

    @property
    def needs(self) -> Needs:
        """As every pull; noise and time of x'_t (`dumo.objectives.twinflow` says why the noise is fresh)."""
        return replace(super().needs, laws={"w.z": Noise(), "w.t": Uniform()})

    def pull(self, net: Net, b: Noised, u: Sample) -> Terms:
        """One pass with gradients, with `alpha` two."""
        t, z = b.drawn["w.t"].to(b.t), b.drawn["w.z"].to(b.z)
        x_t, v_t = b.path.at((b.z - u).detach(), z, t)
        v, _, w = net(x_t, b.c, t=t)
        gap, fit = (w - v).detach(), mean_square(w - v_t)
        loss = FIT * fit
        if self.acts(b) and self.alpha is None:
            loss = loss + WEIGHT * mean_square(descent_error(u, gap))
        elif self.acts(b) and self.alpha is not None:
            # A pass that moves samples; what its weights learn, the terms of the first pass unlearn.
            x_t, aim = b.path.at(b.z - u, z, t)
            v_moved, _, w_moved = net(x_t, b.c, t=t)
            moved = identity(w_moved, v_moved, aim, self.alpha) - identity(w, v, v_t, self.alpha)
            distance = (v_t - v).detach().abs().flatten(1).mean(1).clamp(min=FLOOR)
            loss = loss + WEIGHT * t / distance * moved  # t^2 of the guesses x_t - t v, over their distance t |v_t - v|
        return Terms(loss, {"w": fit}, {"pull_w": mean_square(gap)})


def identity(w: Sample, v: Sample, aim: Sample, alpha: float) -> PerSample:
    """SiD's loss of samples at x'_t: (w - v) (aim - v) - alpha (w - v)^2 in mean, with aim = z' - x' (Zhou et al. 2024,
    arXiv 2404.04057, `sid_loss.py`, of the guesses x_t - t v). w and v are held still as functions, not as numbers.

    Where w is the velocity of the samples, the mean over noise of the first product is that of (w - v)^2, and twice the
    slope at alpha = 1/2 is that of its mean over samples, w's own change with them counted (ours).
    """
    gap = w - v
    return (gap * (aim - v - alpha * gap)).flatten(1).mean(1)
