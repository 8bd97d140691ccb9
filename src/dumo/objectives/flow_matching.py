"""Flow matching (Lipman et al. 2023, arXiv 2210.02747): regress the conditional velocity (paper, Eq. 3).

The mean of v_t given x_t is the velocity of the flow from noise to data, and it minimizes the mean square.
"""

from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    STRAIGHT,
    Frozen,
    Guide,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Terms,
    Times,
    Uniform,
    mean_square,
)


class FlowMatching(ObjectiveSpec):
    """Velocity only, for sampling in many passes."""

    kind: Literal["flow_matching"] = "flow_matching"
    times: Times = Uniform()  # SiT
    drop: float = Field(default=0.1, ge=0, le=1)  # DiT, SiT
    guide: Guide = Guide()  # zeta > 0 is UCGM's enhanced target

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        return Needs(inputs=("t",), heads=("v",), guide=self.guide, formulas=STRAIGHT)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute Eq. 3."""
        (v_hat,) = net(b.x_t, b.c, t=b.t)
        with torch.no_grad():
            v_star = self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t)[0])
        v_loss = mean_square(v_hat - v_star)
        return Terms(v_loss, {"v": v_loss})

    def readings(self, net: Net) -> Readings:
        """Return the velocity, the only head."""
        return Readings(velocity=lambda x, t, c: net(x, c, t=t)[0])
