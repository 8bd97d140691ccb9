"""A secant approximation of du/dt, by one pass at an earlier time (`earlier_mean_velocity`).

With dx_t/dt = w, step back from t by d, to l = t - d and x_l = x_t - d w. Then

    du/dt = (u(x_t, t) - u(x_l, l)) / d + O(d).

With it, a target u* = w - (l - r) du/dt means a step of length d along w, followed by the network's jump. The rounding
error of the target grows with the gain (l - r) / d. A short d needs fp32, as a central difference does; losses check
this with `dumo.flow.compatibility.require_precise_passes`.
"""

import torch

from dumo.flow import dropout
from dumo.flow.linearize import merge_rows, split_rows
from dumo.types import Frozen, NoisyBatch, Sample, Time, lift
from dumo.types.batch_rows import index


@torch.no_grad()
def earlier_mean_velocity(ref: Frozen, b: NoisyBatch, w: Sample, d: Time) -> Sample:
    """Return u(x_l, l, r) (b, ...) of a network with one head, without gradients; zeros on rows not in `b.moving`.

    w: the velocity (b, ...) of the step back.
    d: its length (b,) in units of t; l is clamped to 0.

    If l < r, it is u(x_l, l, l), and the caller must give such rows no weight. Makes one pass, or none without moving
    rows.
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
