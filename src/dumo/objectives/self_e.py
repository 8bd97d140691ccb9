"""Self-E (Yu et al. 2025, arXiv 2512.22374): flow matching, and a pull on samples by the network's own guidance.

The network predicts clean data x^ from x_t, and the second time r is the noise level at which samples are judged:

    x^ = x_t - t v(x_t, t, r; c)                                                              (1)
    x^_r = (1 - r) x^ + r z',        V(c) = v(x^_r, r, r; c),        V(null) likewise         (2)
    x' = x^ + pull r (V(null) - V(c))                                                         (3)

z' is fresh noise. The score of a distribution diffused to r is -(x_r + (1 - r) V) / r, so (3) moves a prediction along
the gradient of log p(c | x^_r): as distribution matching does, with the unconditional score in place of the score of
samples. Neither a second network nor a teacher is needed, only dropped conditions. V(c) is of theta^-.

At r = t, and on rows without a condition, the target is the data x. Elsewhere it is between x and x' (Eq. 16), and has
the length of x (Eq. 20):

    lambda = t / (1 - t) - r / (1 - r),        m = (x + lambda x') / (1 + lambda)             (4)
    x* = sg(m |x| / |m|),        loss = |v - (x_t - x*) / t|^2                                (5)

Eq. 16 is |v - v_t|^2 + lambda |v - v'|^2 with the velocity v' of x'. Its gradient is 1 + lambda times that of the
target m, which is finite at t = 1, too.

Sampling: x_s = x_t - (t - s) v(x_t, t, s; c), so r is the next time (Eq. 22). A jump to r = 0 is not pulled and ends at
E[x | x_t], which is blurred at high t: the method is for 4 or more passes. It has no mean velocity.

The authors have published no code. Two parts are not implemented: the distance t - r grows to its full length in the
first 300,000 of their 710,000 steps (S.2), and in the last 160,000 V(null) is partly replaced by V for a prompt "fake
image".
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator

from dumo.objectives.base import (
    Frozen,
    Jumps,
    LogitNormal,
    Needs,
    Net,
    Noise,
    NoisyBatch,
    ObjectiveSpec,
    Readings,
    Sample,
    Terms,
    Times,
    dropout,
    frozen,
    index,
    lift,
    mean_square,
    mean_velocity,
)

TINY = 1e-12  # keeps 0 / 0 at t = 0 and at r = t = 1 at 0


class SelfE(ObjectiveSpec):
    """Clean data from x_t, judged at the noise level r: by the data, and by the network's own guidance if r < t."""

    kind: Literal["self_e"] = "self_e"
    # r = t on half of the rows (S.2). The mean of t is the paper's for 512 tokens; it grows to 1.15 for 4,096.
    times: Times = Jumps(of=LogitNormal(mean=0.5), velocity_ratio=0.5, data_ratio=0.0)
    drop: float = Field(default=0.1, ge=0, le=1)  # our choice; V(null) is learned from dropped conditions
    pull: float = Field(default=1.0, gt=0)  # the weight of the pull in (3); lower values keep more diversity (ours)
    scaled: bool = True  # whether the target has the length of the data (Eq. 20)

    @property
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""
        return Needs(
            inputs=("t", "r"),
            heads=("v",),
            laws={"z_fresh": Noise()},
            diffuses_samples=True,
            reads_null=True,
        )

    @model_validator(mode="after")
    def _require_judged_rows(self) -> "SelfE":
        if not self.times.between or self.times.moving_share == 0:
            raise ValueError(
                f"times '{self.times.kind}' has no rows with 0 < r < t, the only ones that are judged: use "
                "times={kind: jumps, data_ratio: 0}"
            )
        return self

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the mean square of (5) for each row."""
        (v_hat,) = net(b.x_t, b.c, t=b.t, r=b.r)
        v_star = b.v_t
        rows, _ = b.moving_and_resting_rows
        if rows:
            i = index(rows, b.t.device)
            with torch.no_grad(), dropout.rows(i), dropout.off():
                judged = self._judged_target(net, ref, b[rows], v_hat[i])
            v_star = v_star.index_copy(0, i, judged.to(v_star))
        v_loss = mean_square(v_hat - v_star)
        return Terms(v_loss, {"v": v_loss})

    def _judged_target(self, net: Net, ref: Frozen, b: NoisyBatch, v_hat: Sample) -> Sample:
        """Return (x_t - x*) / t; it is v_t at r = t, and on rows without a condition."""
        x_hat = b.x_t - lift(b.t, b.x_t) * v_hat  # (1)
        x_r, _ = b.path.at(x_hat, b.drawn["z_fresh"].to(b.z), b.r)
        (v_c,) = ref(x_r, b.c, t=b.r, r=b.r)  # (2)
        (v_null,) = frozen(net)(x_r, b.null, t=b.r, r=b.r)
        x_self = x_hat + self.pull * lift(b.r, b.x_t) * (v_null - v_c)  # (3)

        # The mean m is x + w (x' - x), with w = lambda / (1 + lambda). With a teacher, x is its prediction.
        x = b.x_t - lift(b.t, b.x_t) * b.v_t
        gap = (b.t - b.r) * b.kept
        w = gap / (gap + (1 - b.t) * (1 - b.r)).clamp(min=TINY)
        x_star = x + lift(w, x) * (x_self - x)  # (4)
        if self.scaled:
            length, mean_length = (a.flatten(1).norm(dim=1) for a in (x, x_star))
            x_star = lift(length / mean_length.clamp(min=TINY), x) * x_star
        return b.v_t + (x - x_star) / lift(b.t.clamp(min=TINY), x)  # (5)

    def readings(self, net: Net) -> Readings:
        """Return those of a mean velocity without the endpoint, because a jump to the data ends at its mean."""
        return replace(mean_velocity(net), endpoint=None)
