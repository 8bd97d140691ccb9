"""DuMo without guidance, and a pull: a V by which the net's own one-pass samples move to where the data are.

The regression of u sees one sample at a time, a pull compares the laws of samples and data. The samples
x' = z - u(z, 1) are regressed on sg(x' + V), so u descends V. What a pull knows it learns by a head of its own on the
same trunk, from the first step on, of samples that are held still. It moves them from a share `after` of the training
on, for a map that is still far off gains nothing (ours). So every step uses every head, in one backward pass with one
optimizer.

DuMo's part is without guidance: guided samples have another law than the data.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import Field

from dumo.flow.reading import jump_to_data
from dumo.flow.residual import clipped_share
from dumo.flow.slope import CentralSlope, Slope
from dumo.flow.times import Beta, Times
from dumo.types import Frozen, Needs, Net, Noised, Reads, Sample, Spec, Terms, frozen, lift, mean_square

BETA = 0.7  # weight of the velocity in DuMo's part of the loss, Tab. 3


class Pull(Spec, ABC):
    """What `match`, `critic` and `drift` share."""

    own: ClassVar[tuple[str, ...]] = ()  # the heads by which it learns
    after: ClassVar[float] = 0.5  # share of the training from which on it moves samples; ours
    times: Times = Beta(a=2.4, b=2.4)  # as DuMo
    drop: float = Field(default=0.1, ge=0, le=1)  # as DuMo
    slope: Slope = CentralSlope(h=0.005)  # as DuMo

    @property
    def needs(self) -> Needs:
        """What the net takes and gives, and the loss takes."""
        phases = tuple(phase for phase in ((0.0, self.after), (self.after, 1 - self.after)) if phase[1])
        return Needs(heads=("v", "u", *self.own), slope=self.slope, phases=phases)

    def acts(self, b: Noised) -> bool:
        """Whether it moves samples in this step."""
        return b.progress >= self.after

    @abstractmethod
    def pull(self, net: Net, b: Noised, u: Sample) -> Terms:
        """What it adds to the loss, its parts and its notes; u is u(z, 1), with gradients if it `acts`."""

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """DuMo's Alg. 1, lines 7 to 12, and the pull by one pass more."""
        heads, along = self.slope(net, ref, b.x_t, b.c, t=b.t, toward=b.v_t)
        with torch.no_grad():
            u_star = b.v_t - lift(b.t, b.x_t) * along(b.v_t)[1]
        e = heads[1] - u_star
        parts, notes = {"v": mean_square(heads[0] - b.v_t), "u": mean_square(e)}, {"clipped_share": clipped_share(e)}
        loss = BETA * parts["v"] + (1 - BETA) * parts["u"]
        sampled = (net if self.acts(b) else frozen(net))(b.z, b.c, t=torch.ones_like(b.t))
        pull = self.pull(net, b, sampled[1])
        return Terms(loss + pull.loss, {**parts, **pull.parts}, {**notes, **pull.notes})

    def read(self, net: Net) -> Reads:
        """The v head is the slope of the path; the u head jumps to the data."""
        return Reads(velocity=lambda x, t, c: net(x, c, t=t)[0], endpoint=jump_to_data(net, head=1))
