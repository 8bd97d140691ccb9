"""A secant in place of du/dt: one pass at an earlier time (`earlier_mean_velocity`), instead of a derivative.

Along the flow x_t moves with velocity w. Go back from t by d, to l = t - d and x_l = x_t - d w. Then

    du/dt  is about  (u(x_t, t) - u(x_l, l)) / d,    off by O(d).

In a target u* = w - (l - r) du/dt it says: go back by d along w, then jump the rest as the net would. The target's
rounding grows as (l - r) / d, the gain. With a short d it needs fp32, as a central difference does: losses ask for
that by `dumo.flow.compatibility.require_precise_passes`.
"""

import torch

from dumo.flow import dropout
from dumo.flow.linearize import merge_rows, split_rows
from dumo.types import Frozen, NoisyBatch, Sample, Time, lift
from dumo.types.batch_rows import index


@torch.no_grad()
def earlier_mean_velocity(ref: Frozen, b: NoisyBatch, w: Sample, d: Time) -> Sample:
    """u(x_l, l, r) (b, ...) of a net of one head, without gradients; zeros on the rows that may not move (`b.moving`).

    w (b, ...): the velocity to go back along. d (b,): how far, in units of t; l stays at or above 0.

    Where l is below r it is u(x_l, l, l): the caller gives such rows no weight. One pass, none if no row may move.
    """
    moving_rows, resting_rows = split_rows(b.moving, len(b.t))
    if not moving_rows:
        return torch.zeros_like(b.x_t)
    i = index(moving_rows, d.device)
    moving = b[moving_rows]
    d = d[i]
    l = (moving.t - d).clamp(min=0)  # noqa: E741, SoFlow's letter
    x_l = moving.x_t - lift(d, moving.x_t) * w[i]
    with dropout.rows(i):
        (u_l,) = ref(x_l, moving.c, t=l, r=torch.minimum(moving.r, l))
    zeros = u_l.new_zeros(len(resting_rows), *u_l.shape[1:])
    return merge_rows(u_l, zeros, moving_rows, resting_rows)
