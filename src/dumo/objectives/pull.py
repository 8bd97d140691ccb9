"""DuMo without guidance, and a loss that moves the network's one-pass samples towards the distribution of the data.

The regression of u uses one sample at a time; the additional loss, the pull, compares the distributions of samples and
data. It gives each sample x' a detached displacement V as its regression target:

    u* = v_t - t du/dt                                                        (1)  DuMo's Alg. 1, line 10
    x' = z - u(z, 1)                                                          (2)
    x'* = sg(x' + V)                                                          (3)

`Match`, `Critic` and `Drift` define V. Two of them learn it with an extra head, from the first step, with detached
samples. Samples move only after a share `after` of the training, because an inaccurate map does not benefit (our
choice). Every step trains all heads, in one backward pass with one optimizer.

DuMo's part has no guidance, because guided samples do not have the distribution of the data.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field

from dumo.objectives.base import (
    Beta,
    CentralSlope,
    Frozen,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Slope,
    Terms,
    Times,
    clipped_share,
    frozen,
    lift,
    mean_square,
    velocity_and_jump,
)

BETA = 0.7  # weight of the velocity in DuMo's part of the loss, Tab. 3


class Pull(ObjectiveSpec):
    """The base class of `Match`, `Critic` and `Drift`: DuMo's loss and one-pass samples. Subclasses define `pull`."""

    own_heads: ClassVar[tuple[str, ...]] = ()  # the extra heads
    after: ClassVar[float] = 0.5  # the share of the training after which samples move (our choice)
    times: Times = Beta(a=2.4, b=2.4)  # as DuMo
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        phases = ((0.0, self.after), (self.after, 1 - self.after))
        phases = tuple((progress, share) for progress, share in phases if share > 0)
        return Needs(heads=("v", "u", *self.own_heads), slope=self.slope, scheduled=self.after > 0, phases=phases)

    def moves_samples(self, b: NoisyBatch) -> bool:
        """Whether samples move in this step."""
        return b.progress >= self.after

    @abstractmethod
    def pull(self, net: Net, b: NoisyBatch, u: Sample) -> Terms:
        """Return the terms to add to DuMo's loss, parts and metrics.

        u: u(z, 1) (b, ...), with gradients if samples move in this step (`moves_samples`).
        """

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute DuMo's Alg. 1, lines 7 to 12, and the pull with another pass."""
        heads, along = self.slope(net, ref, b.x_t, b.c, t=b.t, direction=b.v_t)
        v_hat, u_hat = heads[:2]
        with torch.no_grad():
            du_dt = along(b.v_t)[1]
            u_star = b.v_t - lift(b.t, b.x_t) * du_dt  # (1)
        u_error = u_hat - u_star
        v_loss = mean_square(v_hat - b.v_t)
        u_loss = mean_square(u_error)
        loss = BETA * v_loss + (1 - BETA) * u_loss

        sampling_net = net if self.moves_samples(b) else frozen(net)
        u_at_noise = sampling_net(b.z, b.c, t=torch.ones_like(b.t))[1]  # of (2)
        pull = self.pull(net, b, u_at_noise)
        parts = {"v": v_loss, "u": u_loss, **pull.parts}
        notes = {"clipped_share": clipped_share(u_error), **pull.notes}
        return Terms(loss + pull.loss, parts, notes)

    def readings(self, net: Net) -> Readings:
        """Return the velocity v and the endpoint, as DuMo."""
        return velocity_and_jump(net)
