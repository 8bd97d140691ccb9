"""TBSM (three-body scattering modeling, Sun et al. 2026, arXiv 2607.18198): samples move to data and repel each other.

The energy distance of samples and data, 2 E|x' - p| - E|x' - n| - E|p - p'|, decreases fastest if each sample x' moves
towards data p, and away from other samples n, by steps of equal length. One p and one n per row suffice:

    x' = z - u(z, 1)                                                                          (1)
    e(y) = sqrt(D) (y - x') / (|y - x'| + FLOOR),        for samples of D numbers             (2)
    x'* = sg(x' + e(p) - e(n))                                                                (3)

p is the row's data; n is a detached sample of the same condition from other noise. If samples have the distribution of
the data, p and n are exchangeable, and the mean of e(p) - e(n) is 0.

Unlike DuMo, there is no velocity and no derivative: u is trained at t = 1 only, for one pass. The direction is not
informative for samples far from the data, so the training starts from a trained network (`start`).

Sources: the abstract, and two ports of the authors' `tbsm.py` (their repository was not available). Both have (1) to
(3), with the factor sqrt(D) and FLOOR, at the paper's lambda = 1 (the weight of e(n)) and rho = 0 (the share of a
second network, which learns the mean of e(p) - e(n)). Differences:

- They compare features of pretrained networks; we compare pixels or latents, the data of the training.
- One port also starts at t < 1, from x_t = t z + (1 - t) p, where p and n are not exchangeable.
- They divide the loss of a batch by its value, which has no effect with Adam.
- z is fresh noise, because `train.coupling` and `teacher.pairs` may correlate the row's noise with p.
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

FLOOR = 1e-6  # added to the distance in (2), as the authors


class TBSM(ObjectiveSpec):
    """The map from noise to data in one pass, with one attraction and one repulsion per row."""

    kind: Literal["tbsm"] = "tbsm"
    times: Uniform = Uniform(low=1.0, high=1.0)  # samples start from noise
    drop: float = Field(default=0.0, ge=0, le=1)  # our choice, because there is no guidance

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the noise of x' and n."""
        laws = {"x.z": Noise(), "n.z": Noise()}
        return Needs(heads=("u",), laws=laws, teacher=FromTeacher("no"))

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Make one pass with gradients and one without."""
        t = torch.ones_like(b.t)
        z = b.drawn["x.z"].to(b.z.dtype)
        (u_hat,) = net(z, b.c, t=t)
        x_hat = z - u_hat  # (1)
        with torch.no_grad():
            other_z = b.drawn["n.z"].to(b.z.dtype)
            with dropout.off():
                (other_u,) = ref(other_z, b.c, t=t)
            attraction = direction_to(x_hat, b.x)
            repulsion = direction_to(x_hat, other_z - other_u)
            x_star = x_hat + attraction - repulsion  # (3)
        loss = mean_square(x_hat - x_star)
        return Terms(loss, {"u": loss})

    def readings(self, net: Net) -> Readings:
        """Return the endpoint x_0 = x_1 - u, trained at t = 1 only."""
        return Readings(endpoint=jump_to_data(net), lowest=1.0)


def direction_to(x: Sample, y: Sample) -> Sample:
    """Return the direction (2) from samples x (b, ...) to samples y, with root mean square 1, or 0 if x = y."""
    offset = y - x
    distance = torch.linalg.vector_norm(offset.flatten(1), dim=1)
    root_size = x[0].numel() ** 0.5
    return offset * lift(root_size / (distance + FLOOR), x)
