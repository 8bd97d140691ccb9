"""TwinFlow (Cheng et al. 2025, arXiv 2512.05150): RCGM, and a twin at negative times that follows the net's samples.

One jump from noise makes x' = z - u(z, 1, 0). Given -t the net learns the velocity of these as it learns that of the
data given t. Where the two differ, samples and data do: the score is -(x_t + (1 - t) v) / t, so the gradient of the
divergence KL(samples || data), diffused to t, by x' is along v(x_t, t) - v(x_t, -t), and by u, which has x' = z - u,

    G = v(x_t, -t) - v(x_t, t),

held still, that u(z, 1, 0) descends. Both velocities agree on the data's law alone, so without guidance the exact flow
is at rest. Guided it is not: v(x_t, t) is then v*, which is not the velocity of its own samples diffused by new noise.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from dumo.flow.draw import Noise
from dumo.flow.residual import clipped_share, descent_error
from dumo.flow.slope import require_precise_passes
from dumo.flow.times import Uniform
from dumo.objectives.rcgm import RCGM
from dumo.types import Frozen, Needs, Net, Noised, Sample, Terms, frozen, mean_square


class TwinFlow(RCGM):
    """RCGM on all rows, and at (1, 0), where one jump is made; flow matching; the twin and what it corrects.

    All terms are on all rows, of weight 1, as in the tutorial (`methodes.py`); but the noise of the twin is not
    that which the sample was made of, as in `twinflow.py`: made so, the velocity of the samples would be that of
    straight lines from their own noise, which is another law's, and not even the unguided flow would be at rest.
    """

    signed: ClassVar[bool] = True
    kind: Literal["twinflow"] = "twinflow"  # pyright: ignore[reportIncompatibleVariableOverride], which distinguishes it

    @property
    def needs(self) -> Needs:
        """As RCGM; the noise that samples are diffused with, for the twin and for G, and the time of G (dist_match)."""
        return replace(super().needs, laws={"z_twin": Noise(), "t_twin": Uniform()})

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """`training_step`. Raises UserError where a short step meets bf16."""
        require_precise_passes(b, self.gain, self.kind)
        (u_hat,), (v_hat,) = net(b.x_t, b.c, t=b.t, r=b.r), net(b.x_t, b.c, t=b.t, r=b.t)
        one = replace(b.at(1.0), r=torch.zeros_like(b.r))
        (u_one,) = net(one.x_t, b.c, t=one.t, r=one.r)
        made = replace(b, x=(one.x_t - u_one).detach(), z=b.drawn["z_twin"].to(b.z), teacher=None)  # not the teacher's
        fake = made.at(b.t)
        (v_fake,) = net(fake.x_t, b.c, t=-b.t, r=-b.t)

        v_star = self.aim(ref, b)
        e, off = self.residual(u_hat, ref, b, v_star)
        e_one, _ = self.residual(u_one, ref, one, self.aim(ref, one))
        pull = descent_error(u_one, self._apart(frozen(net), made.at(b.drawn["t_twin"].to(b.t))))
        errors = {"u": e, "flow": v_hat - v_star, "one": e_one, "twin": v_fake - fake.v_t, "rectify": pull}
        parts = {name: mean_square(error) for name, error in errors.items()}
        return Terms(torch.stack([*parts.values()]).sum(0), parts, {"clipped_share": clipped_share(off, self.clip)})

    def _apart(self, net: Frozen, b: Noised) -> Sample:
        """G: the twin's velocity less the net's, of samples diffused to t."""
        (v_fake,), (v_real,) = (net(b.x_t, b.c, t=s, r=s) for s in (-b.t, b.t))
        return v_fake - v_real
