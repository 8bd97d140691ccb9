"""IMM (Inductive Moment Matching, Zhou et al. 2025, arXiv 2503.07565): two jumps to r land on one distribution.

From t one jumps to r along the mean velocity u, and from q, between r and t, on the same line from x to z, too:

    y = x_t - (t - r) u(x_t, t, r),        y' = x_q - (q - r) sg u(x_q, q, r).

Where y' has the distribution of x_r, so shall y. At q = r it has, for y' = x_r itself; and by small steps of q what is
known at r reaches t = 1. Distributions are compared by samples, rows of a group that share their times: with a kernel
K, the mean discrepancy of a group of M is

    MMD^2 = mean over j, k of   K(y_j, y_k) + K(y'_j, y'_k) - 2 K(y_j, y'_k).

Nothing here is regressed, and no velocity enters. The pairs j = k, 1 of M, compare y with the y' of its own x and z,
which is on average nearer to the mean than y: at the exact flow they leave a pull of O(1 / M). Of Gaussian data it
shrinks with the gap t - q; of skewed data it does not.

Rows of a group have labels of their own, the same for y and y'. Then all pairs j, k of different labels only match what
is made of all labels together; it is the pairs j = k, and those of one label, that match each by itself.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dumo.flow.reading import mean_velocity
from dumo.flow.times import Below, Groups, Uniform
from dumo.types import (
    Formulas,
    FromTeacher,
    Frozen,
    Needs,
    Net,
    Noised,
    PerSample,
    Reads,
    Spec,
    Terms,
    Time,
    lift,
)

NEAREST = 1e-4  # q is at least so far below t, if r is


class IMM(Spec):
    """Jumps from t to r, by samples; constants of the authors' for ImageNet at 256 (as others made them out)."""

    gap: ClassVar[float] = 160 / 2**12  # from t down to q, in t / (1 - t); 160 / 2^15 on CIFAR-10
    a: ClassVar[float] = 2.0  # of the weight, as `weight` has them; 1 and 5 on CIFAR-10
    b: ClassVar[float] = 4.0
    kind: Literal["imm"] = "imm"
    times: Groups = Groups(of=Below(of=Uniform(high=0.994)))
    drop: float = Field(default=0.1, ge=0, le=1)

    @property
    def needs(self) -> Needs:
        """What the net takes and gives; there is no velocity in the loss. Its constants are for deviation 1."""
        return Needs(inputs=("t", "r"), heads=("u",), teacher=FromTeacher("no"), formulas=Formulas(unit=True))

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """One pass with gradients, one without; every row of whole groups has its group's loss."""
        at_q = b.at(self.nearer(b.t, b.r))
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        (u_q,) = ref(at_q.x_t, b.c, t=at_q.t, r=b.r)
        y, y_q = b.x_t - lift(b.t - b.r, b.x_t) * u_hat, at_q.x_t - lift(at_q.t - b.r, b.x_t) * u_q
        far = self.discrepancy(y, y_q, b.t - b.r)
        return Terms(self.weight(b.t) * far, {"u": far})

    def nearer(self, t: Time, r: Time) -> Time:
        """q: below t by `gap` in t / (1 - t), and by 1e-4 at least; but never below r."""
        lead = (t - self.gap * (1 - t)).clamp(min=0)
        return torch.maximum(r, torch.minimum(lead / (lead + 1 - t), t - NEAREST))

    def discrepancy(self, y: Tensor, y_q: Tensor, step: Time) -> PerSample:
        """MMD^2 of each row's group, by Laplace's kernel exp(-|a - b| / ((t - r) D)) of D numbers; at least in fp32."""
        exact = torch.promote_types(y.dtype, torch.float32)
        mine, other = (a.to(exact).flatten(1).unflatten(0, (-1, self.times.size)) for a in (y, y_q))
        width = (step.clamp(min=NEAREST) * mine.shape[-1]).view(-1, self.times.size, 1)

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            square = (a[:, :, None] - b[:, None]).square().sum(-1)
            return torch.exp(-square.clamp(min=1e-16).sqrt() / width)

        every = kernel(mine, mine) + kernel(other, other) - 2 * kernel(mine, other)
        return every.mean((1, 2)).repeat_interleave(self.times.size)

    def weight(self, t: Time) -> PerSample:
        """(1/2) sigmoid(b - lambda) (-dlambda/dt) (1 - t)^a / (t^2 + (1 - t)^2), with lambda = 2 log((1 - t) / t).

        The factors before (1 - t)^a are e^b t / ((1 - t) (e^b t^2 + (1 - t)^2)), and nothing is divided by 0.
        """
        up = torch.exp(t.new_tensor(self.b))
        return up * t * (1 - t) ** (self.a - 1) / ((up * t**2 + (1 - t) ** 2) * (t**2 + (1 - t) ** 2))

    def read(self, net: Net) -> Reads:
        """One head, read at two times. What it says at r = t, the velocity, is taught by its neighbours only."""
        return mean_velocity(net)
