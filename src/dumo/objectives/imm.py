"""IMM (Inductive Moment Matching, Zhou et al. 2025, arXiv 2503.07565): jumps to r from two times are matched with MMD.

Train jumps t -> r by matching their samples to those of jumps q -> r, with MMD. x_q is between r and t on the same line
from x to z, and u is the mean velocity:

    y  = x_t - (t - r) u(x_t, t, r)                                                           (1)
    y' = x_q - (q - r) sg u(x_q, q, r)                                                        (2)
    MMD^2 = mean over j, k of   K(y_j, y_k) + K(y'_j, y'_k) - 2 K(y_j, y'_k)                  (3)
    K(a, b) = exp(-|a - b| / ((t - r) D)),        for rows of D numbers                       (4)

The argument is an induction: at q = r, y' = x_r has the correct distribution. If jumps from q have it, matching gives
it to jumps from t slightly above q, and so on up to t = 1. The MMD is estimated from the M rows of a group, which have
the same times.

Unlike DuMo, there is no regression and no velocity. The pairs j = k, 1 of M, compare y with the y' of the same x and z,
which is on average closer to the mean than y: at the exact flow they leave a bias of O(1 / M). For Gaussian data it
decreases with the gap t - q; for skewed data it does not.

Rows of a group have different labels, the same for y and y'. Pairs of rows with different labels match only the mixture
of all labels. A single label is matched by the pairs of that label and by j = k.
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

MIN_GAP = 1e-4  # the smallest t - q, unless q = r


class IMM(ObjectiveSpec):
    """Jumps from t to r, with the authors' constants for ImageNet at 256 pixels (as reported by others)."""

    gap: ClassVar[float] = 160 / 2**12  # from t to q, in t / (1 - t); 160 / 2^15 on CIFAR-10
    # a and b of `weight`; 1 and 5 on CIFAR-10.
    weight_power: ClassVar[float] = 2.0
    weight_bias: ClassVar[float] = 4.0
    kind: Literal["imm"] = "imm"
    times: Groups = Groups(of=Below(of=Uniform(high=0.994)))
    drop: float = Field(default=0.1, ge=0, le=1)

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network. The constants are for data of standard deviation 1."""
        return Needs(inputs=("t", "r"), heads=("u",), teacher=FromTeacher("no"), formulas=Formulas(unit=True))

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Make one pass with gradients and one without. Every row has the loss of its group."""
        at_q = b.at(self.earlier_time(b.t, b.r))
        (u_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        (u_q,) = ref(at_q.x_t, b.c, t=at_q.t, r=b.r)
        y = b.x_t - lift(b.t - b.r, b.x_t) * u_hat  # (1)
        y_q = at_q.x_t - lift(at_q.t - b.r, b.x_t) * u_q  # (2)
        mmd = self.discrepancy(y, y_q, b.t - b.r)  # (3)
        return Terms(self.weight(b.t) * mmd, {"u": mmd})

    def earlier_time(self, t: Time, r: Time) -> Time:
        """Return q (b,): below t by `gap` in t / (1 - t), and by at least MIN_GAP, but not below r."""
        # (1 - t) (t / (1 - t) - gap), in a form that is finite at t = 1.
        scaled_ratio = (t - self.gap * (1 - t)).clamp(min=0)
        q = scaled_ratio / (scaled_ratio + 1 - t)
        return torch.maximum(r, torch.minimum(q, t - MIN_GAP))

    def discrepancy(self, y: Tensor, y_q: Tensor, step: Time) -> PerSample:
        """Return MMD^2 (3) of each row's group, for jumps of length `step` = t - r, computed in at least fp32."""
        exact = torch.promote_types(y.dtype, torch.float32)
        y = y.to(exact).flatten(1).unflatten(0, (-1, self.times.size))
        y_q = y_q.to(exact).flatten(1).unflatten(0, (-1, self.times.size))
        width = (step.clamp(min=MIN_GAP) * y.shape[-1]).view(-1, self.times.size, 1)

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            """Return (4) of all pairs of a group."""
            squared_distance = (a[:, :, None] - b[:, None]).square().sum(-1)
            return torch.exp(-squared_distance.clamp(min=1e-16).sqrt() / width)

        pairs = kernel(y, y) + kernel(y_q, y_q) - 2 * kernel(y, y_q)
        return pairs.mean((1, 2)).repeat_interleave(self.times.size)

    def weight(self, t: Time) -> PerSample:
        """Return (1/2) sigmoid(b - lambda) (-dlambda/dt) (1 - t)^a / (t^2 + (1 - t)^2), lambda = 2 log((1 - t) / t).

        The factors before (1 - t)^a are e^b t / ((1 - t) (e^b t^2 + (1 - t)^2)); this form has no division by 0.
        """
        e_b = torch.exp(t.new_tensor(self.weight_bias))
        return e_b * t * (1 - t) ** (self.weight_power - 1) / ((e_b * t**2 + (1 - t) ** 2) * (t**2 + (1 - t) ** 2))

    def readings(self, net: Net) -> Readings:
        """Return jumps from t to r. The velocity, at r = t, is trained only by neighbouring times."""
        return mean_velocity(net)
