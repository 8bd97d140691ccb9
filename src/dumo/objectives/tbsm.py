"""TBSM (three-body scattering modeling, Sun et al. 2026, arXiv 2607.18198): samples go to data, and apart.

The energy distance of samples and data, 2 E|x' - p| - E|x' - n| - E|p - p'|, falls fastest where each sample x' moves
to a p of the data, and away from an n of the other samples, by a step of one length. A pair p, n a row is enough:

    x' = z - u(z, 1)                                                                          (1)
    e(y) = sqrt(D) (y - x') / (|y - x'| + FLOOR),        for samples of D numbers             (2)
    x'* = sg(x' + e(p) - e(n))                                                                (3)

p is the row's data; n is a sample of its condition from noise of its own, held still. Where samples are distributed as
the data, p and n may change places, and the mean of e(p) - e(n) is 0.

Unlike DuMo there is no velocity and no derivative: u is learned at t = 1 alone, for one pass. It tells little where
samples are far from the data, so it begins from a trained net (`start`).

Read: the abstract, and two ports of the authors' `tbsm.py` (their repository was not available). Both have (1) to (3),
with the factor sqrt(D) and FLOOR, at the paper's lambda = 1 (the weight of e(n)) and rho = 0 (the share of a second
net, which learns the mean of e(p) - e(n)). Of ours:

- Theirs compares features of pretrained nets; ours what the net is trained on, pixels or latents.
- One port also begins at t < 1, from x_t = t z + (1 - t) p. There p and n do not change places, and nothing rests.
- Theirs divides the loss of a batch by its value, which Adam does not see.
- z is fresh noise, since `train.coupling` and `teacher.pairs` may tie the row's own to p.
"""

from typing import Literal

import torch
from pydantic import Field

from dumo.objectives.base import (
    FromTeacher,
    Frozen,
    Needs,
    Net,
    Noise,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Terms,
    Uniform,
    dropout,
    jump_to_data,
    lift,
    mean_square,
)

FLOOR = 1e-6  # added to a distance that is divided by; theirs


class TBSM(ObjectiveSpec):
    """The map from noise to data in one pass, by one attraction and one repulsion a row."""

    kind: Literal["tbsm"] = "tbsm"
    times: Uniform = Uniform(low=1.0, high=1.0)  # samples begin as noise; nothing is drawn
    drop: float = Field(default=0.0, ge=0, le=1)  # ours: without guidance no null class is needed

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net, and the noises of x' and of n."""
        laws = {"x.z": Noise(), "n.z": Noise()}
        return Needs(heads=("u",), laws=laws, teacher=FromTeacher("no"))

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """One pass with gradients, one without."""
        t = torch.ones_like(b.t)
        z = b.drawn["x.z"].to(b.z.dtype)
        (u_hat,) = net(z, b.c, t=t)
        x_hat = z - u_hat  # (1)
        with torch.no_grad():
            other_z = b.drawn["n.z"].to(b.z.dtype)
            with dropout.off():
                (other_u,) = ref(other_z, b.c, t=t)
            attraction = bearing(x_hat, b.x)
            repulsion = bearing(x_hat, other_z - other_u)
            x_star = x_hat + attraction - repulsion  # (3)
        loss = mean_square(x_hat - x_star)
        return Terms(loss, {"u": loss})

    def readings(self, net: Net) -> Readings:
        """The head jumps from noise, at t = 1 alone, to the data: x_0 = x_1 - u."""
        return Readings(endpoint=jump_to_data(net), lowest=1.0)


def bearing(x: Sample, y: Sample) -> Sample:
    """The direction (2) from samples x (b, ...) to samples y, shaped like x: root mean square 1, or 0 where x = y."""
    offset = y - x
    distance = torch.linalg.vector_norm(offset.flatten(1), dim=1)
    root_size = x[0].numel() ** 0.5
    return offset * lift(root_size / (distance + FLOOR), x)
