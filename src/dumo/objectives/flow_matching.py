"""Flow matching (Lipman et al. 2023, arXiv 2210.02747): regress the conditional velocity (paper, Eq. 3).

The mean of v_t given x_t is the velocity of the flow that carries noise to data, and mean squares find means.
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
    """The velocity alone: many passes to sample, and the yardstick for every v head."""

    kind: Literal["flow_matching"] = "flow_matching"
    times: Times = Uniform()  # SiT
    drop: float = Field(default=0.1, ge=0, le=1)  # DiT, SiT
    guide: Guide = Guide()  # none; with zeta > 0 it is UCGM's enhanced target

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and what else the loss needs."""
        return Needs(inputs=("t",), heads=("v",), guide=self.guide, formulas=STRAIGHT)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Eq. 3."""
        (v_hat,) = net(b.x_t, b.c, t=b.t)
        with torch.no_grad():
            v_star = self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t)[0])
        v_loss = mean_square(v_hat - v_star)
        return Terms(v_loss, {"v": v_loss})

    def readings(self, net: Net) -> Readings:
        """The one head is the slope of the path."""
        return Readings(velocity=lambda x, t, c: net(x, c, t=t)[0])
