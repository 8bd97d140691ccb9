"""d/dt of a net's head along the flow, from one pass at an earlier time: a secant in place of the tangent.

With l = t - d, and x_l = x_t - d w on the straight line back along w,

    du/dt  is about  (u(x_t, t) - u(x_l, l)) / d,    off by O(d).

In a target u* = w - (l - r) du/dt it says: go back by d along w, then jump the rest as the net would. No derivative of
the net is taken, but its rounding grows as (l - r) / d, the gain: with a short d these differences want fp32 as central
ones do.
"""

from math import isinf

import torch

from dumo.flow import dropout
from dumo.flow.slope import precision_of
from dumo.types import Frozen, Noised, Sample, Time, UserError, lift
from dumo.types.rows import index

MAX_GAIN = 20  # ours: rounding to bf16, 2^-8 of u, is then 8 % of the residual


def demand(b: Noised, gain: float, kind: str) -> None:
    """Raise UserError where passes on a record round more than objective `kind`, of this gain, can bear."""
    demand_precision(precision_of(b.x_t), gain, kind)


def demand_precision(precision: str, gain: float, kind: str) -> None:
    """Raise UserError where passes of this precision round more than objective `kind`, of this gain, can bear."""
    if gain > MAX_GAIN and precision != "fp32":
        times = "without bound" if isinf(gain) else f"by up to {gain:g}"
        raise UserError(
            f"objective '{kind}' needs precision fp32, not {precision}: it multiplies the rounding of the net {times}. "
            "Use train.precision=fp32, a longer step, or objective 'meanflow' with slope 'dual'"
        )


@torch.no_grad()
def back(ref: Frozen, b: Noised, w: Sample, d: Time) -> Sample:
    """u(x_l, l, r) of the first head at l = t - d, for the rows that may move, known by place; zeros for the others.

    Where l is below r it is u(x_l, l, l): the caller gives such rows no weight. One pass, none if none moves.
    """
    place, _ = b.rows_by_step
    u_l = torch.zeros_like(b.x_t)
    if not place:
        return u_l
    i = index(place, d.device)
    some, d = b[place], d[i]
    l = (some.t - d).clamp(min=0)  # noqa: E741, SoFlow's letter
    with dropout.rows(i):
        (head,) = ref(some.x_t - lift(d, some.x_t) * w[i], some.c, t=l, r=torch.minimum(some.r, l))
    return u_l.to(head).index_copy(0, i, head)
