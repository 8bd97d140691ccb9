"""TwinFlow (Cheng et al. 2025, arXiv 2512.05150): RCGM, and a twin at negative times that follows the net's samples.

One jump from noise makes a sample x'. Given -t the net learns the velocity of samples, diffused by noise z' of their
own, as it learns that of the data given t. Where the two differ, samples and data do:

    x' = z - u(z, 1, 0)                                                                       (1)
    v(x'_t, -t)* = z' - x',        x'_t = t z' + (1 - t) x'                                   (2)
    G = v(x'_t, -t) - v(x'_t, t),        held still, which u(z, 1, 0) descends                (3)

For the score is -(x_t + (1 - t) v) / t, so the gradient by x' of KL(samples || data), diffused to t, is along -G, and
by u, which has x' = z - u, along G. Both velocities agree where samples are distributed as the data alone, so without
guidance the exact flow is at rest. Guided it is not: v(x_t, t) is then v*, which is not the velocity of its own samples
diffused by new noise.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from dumo.objectives.base import (
    Frozen,
    Needs,
    Net,
    Noise,
    NoisyBatch,
    Readings,
    Sample,
    Terms,
    Uniform,
    clipped_share,
    descent_error,
    frozen,
    mean_square,
    mean_velocity,
    require_precise_passes,
)
from dumo.objectives.rcgm import RCGM


class TwinFlow(RCGM):
    """RCGM on all rows, and at t = 1 and r = 0, the one-pass jump; flow matching; the twin and what it corrects.

    All terms are on all rows, of weight 1, as in the tutorial (`methodes.py`). But the noise z' of the twin is drawn
    anew, as in `twinflow.py`. With the noise that the sample was made of, the velocity of the samples would be that of
    straight lines from it, which is another distribution's, and not even the unguided flow would be at rest.
    """

    signed: ClassVar[bool] = True
    kind: Literal["twinflow"] = "twinflow"  # pyright: ignore[reportIncompatibleVariableOverride], which distinguishes it

    @property
    def needs(self) -> Needs:
        """The needs of `RCGM`, the noise that diffuses samples for the twin and G, and the time of G (dist_match)."""
        return replace(super().needs, laws={"z_twin": Noise(), "t_twin": Uniform()})

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """`training_step`. Raises UserError where passes are too coarse for its gain."""
        require_precise_passes(b, self.gain, self.kind)
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        (v_hat,) = net(b.x_t, b.c, t=b.t, r=b.t)
        at_noise = replace(b.at(1.0), r=torch.zeros_like(b.r))
        (u_at_noise,) = net(at_noise.x_t, b.c, t=at_noise.t, r=at_noise.r)
        x_sample = (at_noise.x_t - u_at_noise).detach()  # (1)
        # without the teacher, whose velocity is that of the data
        samples = replace(b, x=x_sample, z=b.drawn["z_twin"].to(b.z), teacher=None)
        twin = samples.at(b.t)
        (v_twin,) = net(twin.x_t, b.c, t=-b.t, r=-b.t)

        v_star = self._v_star(ref, b)
        u_error, unclipped_error = self._residual(u_hat, ref, b, v_star)
        error_at_noise, _ = self._residual(u_at_noise, ref, at_noise, self._v_star(ref, at_noise))
        g = self._velocity_gap(frozen(net), samples.at(b.drawn["t_twin"].to(b.t)))
        parts = {
            "u": mean_square(u_error),
            "flow": mean_square(v_hat - v_star),
            "one": mean_square(error_at_noise),
            "twin": mean_square(v_twin - twin.v_t),  # (2)
            "rectify": mean_square(descent_error(u_at_noise, g)),  # (3)
        }
        loss = torch.stack([*parts.values()]).sum(0)
        return Terms(loss, parts, {"clipped_share": clipped_share(unclipped_error, self.clip)})

    def readings(self, net: Net) -> Readings:
        """Read the one head as `RCGM` does, also at r = t, where every row learns the velocity."""
        return mean_velocity(net)

    def _velocity_gap(self, net: Frozen, b: NoisyBatch) -> Sample:
        """G: the twin's velocity less the net's, of samples diffused to t."""
        (v_fake,) = net(b.x_t, b.c, t=-b.t, r=-b.t)
        (v_real,) = net(b.x_t, b.c, t=b.t, r=b.t)
        return v_fake - v_real
