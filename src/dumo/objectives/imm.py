"""IMM (Inductive Moment Matching, Zhou et al. 2025, arXiv 2503.07565): two jumps to r land on one distribution.

From t one jumps to r along the mean velocity u, and from q, between r and t, on the same line from x to z, too:

    y  = x_t - (t - r) u(x_t, t, r)                                                           (1)
    y' = x_q - (q - r) sg u(x_q, q, r)                                                        (2)
    MMD^2 = mean over j, k of   K(y_j, y_k) + K(y'_j, y'_k) - 2 K(y_j, y'_k)                  (3)
    K(a, b) = exp(-|a - b| / ((t - r) D)),        for rows of D numbers                       (4)

Where y' has the distribution of x_r, so shall y. At q = r it has, for y' = x_r itself; and by small steps of q what is
known at r reaches t = 1. Distributions are compared by samples, the M rows of a group, which share their times.

Unlike DuMo, nothing is regressed, and no velocity enters. The pairs j = k, 1 of M, compare y with the y' of its own x
and z, which is on average nearer to the mean than y: at the exact flow they leave a pull of O(1 / M). Of Gaussian data
it shrinks with the gap t - q; of skewed data it does not.

Rows of a group have labels of their own, the same for y and y'. Pairs of rows with different labels match only the
mixture of all labels. A single label is matched by the pairs of that label and by j = k.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dumo.objectives.base import (
    Below,
    Formulas,
    FromTeacher,
    Frozen,
    Groups,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    PerSample,
    Readings,
    Terms,
    Time,
    Uniform,
    lift,
    mean_velocity,
)

NEAREST = 1e-4  # q is at least so far below t, if r is


class IMM(ObjectiveSpec):
    """Jumps from t to r, by samples; constants of the authors' for ImageNet at 256 (as others made them out)."""

    gap: ClassVar[float] = 160 / 2**12  # from t down to q, in t / (1 - t); 160 / 2^15 on CIFAR-10
    a: ClassVar[float] = 2.0  # of the weight, as `weight` has them; 1 and 5 on CIFAR-10
    b: ClassVar[float] = 4.0
    kind: Literal["imm"] = "imm"
    times: Groups = Groups(of=Below(of=Uniform(high=0.994)))
    drop: float = Field(default=0.1, ge=0, le=1)

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the net. The loss has no velocity, and its constants are for data of deviation 1."""
        return Needs(inputs=("t", "r"), heads=("u",), teacher=FromTeacher("no"), formulas=Formulas(unit=True))

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """One pass with gradients, one without; every row of whole groups has its group's loss."""
        at_q = b.at(self.earlier_time(b.t, b.r))
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        (u_q,) = ref(at_q.x_t, b.c, t=at_q.t, r=b.r)
        y = b.x_t - lift(b.t - b.r, b.x_t) * u_hat  # (1)
        y_q = at_q.x_t - lift(at_q.t - b.r, b.x_t) * u_q  # (2)
        mmd = self.discrepancy(y, y_q, b.t - b.r)  # (3)
        return Terms(self.weight(b.t) * mmd, {"u": mmd})

    def earlier_time(self, t: Time, r: Time) -> Time:
        """q, (b,): below t by `gap` in t / (1 - t), and by NEAREST at least, but never below r."""
        lead = (t - self.gap * (1 - t)).clamp(min=0)  # (1 - t) (t / (1 - t) - gap), finite at t = 1
        q = lead / (lead + 1 - t)
        return torch.maximum(r, torch.minimum(q, t - NEAREST))

    def discrepancy(self, y: Tensor, y_q: Tensor, step: Time) -> PerSample:
        """MMD^2 (3) of each row's group, for jumps of length `step` = t - r; computed at least in fp32."""
        exact = torch.promote_types(y.dtype, torch.float32)
        y = y.to(exact).flatten(1).unflatten(0, (-1, self.times.size))
        y_q = y_q.to(exact).flatten(1).unflatten(0, (-1, self.times.size))
        width = (step.clamp(min=NEAREST) * y.shape[-1]).view(-1, self.times.size, 1)

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            """(4) of all pairs of a group."""
            squared_distance = (a[:, :, None] - b[:, None]).square().sum(-1)
            return torch.exp(-squared_distance.clamp(min=1e-16).sqrt() / width)

        pairs = kernel(y, y) + kernel(y_q, y_q) - 2 * kernel(y, y_q)
        return pairs.mean((1, 2)).repeat_interleave(self.times.size)

    def weight(self, t: Time) -> PerSample:
        """(1/2) sigmoid(b - lambda) (-dlambda/dt) (1 - t)^a / (t^2 + (1 - t)^2), with lambda = 2 log((1 - t) / t).

        The factors before (1 - t)^a are e^b t / ((1 - t) (e^b t^2 + (1 - t)^2)), and nothing is divided by 0.
        """
        e_b = torch.exp(t.new_tensor(self.b))
        return e_b * t * (1 - t) ** (self.a - 1) / ((e_b * t**2 + (1 - t) ** 2) * (t**2 + (1 - t) ** 2))

    def readings(self, net: Net) -> Readings:
        """One head, read at two times. What it says at r = t, the velocity, is taught by its neighbours only."""
        return mean_velocity(net)
