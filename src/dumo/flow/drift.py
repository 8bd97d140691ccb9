"""The field by which samples drift to data (Deng et al. 2026, arXiv 2602.04770): drawn to data, repelled by samples.

Of rows in a group, of one class, sample i sees the data y and the other samples x at distances d in units of their
mean. With the kernel exp(-d / R), made a softmax over what i sees (rows) and over who sees it (columns), of which the
geometric mean is taken, A+ to data and A- to samples,

    V_i = sum over j, k of   A+_ij A-_ik (y_j - x_k),

which changes its sign when data and samples change places: so where both have one law, it is 0 on average. Each of the
radii has its V divided by its root mean square over the group, and they are added. As `drift_loss.py` of the authors,
whose rows of a group are all of one class, and see their own data: here others see it (ours), so that as many attract
as repel, and where the samples are the data themselves V is 0 to rounding, not on average.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dumo.types import Cond, PerSample, Sample

Points = Float[Tensor, "groups m d"]
LEAST = 1e-4  # of a root mean square that is divided by (their code, as its square)
FAR = -1e4  # the logarithm of a kernel between rows that do not see one another


@torch.no_grad()
def drift(x: Sample, y: Sample, c: Cond, radii: Sequence[float], group: int) -> tuple[Sample, PerSample]:
    """V of samples x (b, ...) towards data y, in units in which each radius has root mean square 1; and that of each
    row's group before it was brought to 1, in mean over radii: 0 where samples and data agree.

    Rows of the same c in groups of so many see one another. Raises ValueError where rows are no whole groups.
    """
    if len(x) % group:
        raise ValueError(f"{len(x)} rows are no whole groups of {group}")
    exact = torch.promote_types(x.dtype, torch.float32)
    mine, other = (a.to(exact).flatten(1).unflatten(0, (-1, group)) for a in (x, y))
    seen = _seen(c, group)
    both = torch.cat([mine, other], 1)
    far = torch.cdist(mine, both, compute_mode="donot_use_mm_for_euclid_dist")
    unit = ((far * seen).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)).clamp(min=LEAST)[:, None, None]
    total, sizes = torch.zeros_like(mine), torch.zeros(len(mine), dtype=exact, device=x.device)
    for radius in radii:
        v = _force(mine, both, far / unit, seen, radius) / unit * mine.shape[2] ** 0.5
        size = v.square().mean((1, 2)).sqrt()
        total, sizes = total + v / size.clamp(min=LEAST)[:, None, None], sizes + size / len(radii)
    return total.flatten(0, 1).view(x.shape).to(x.dtype), sizes.repeat_interleave(group)


def _seen(c: Cond, group: int) -> Bool[Tensor, "groups m 2*m"]:
    """Which samples, then which data, a row of each group sees: of its own condition, and not of its own place."""
    rows = c.flatten(1) if c.ndim > 1 else c[:, None]
    rows = rows.unflatten(0, (-1, group))
    same = (rows[:, :, None] == rows[:, None]).all(-1) & ~torch.eye(group, dtype=torch.bool, device=c.device)
    return torch.cat([same, same], 2)


def _force(
    x: Points,
    both: Float[Tensor, "groups 2*m d"],
    far: Float[Tensor, "groups m 2*m"],
    seen: Bool[Tensor, "groups m 2*m"],
    radius: float,
) -> Points:
    """V by one radius."""
    logs = (-far / radius).masked_fill(~seen, FAR)
    a = (logs.softmax(2) * logs.softmax(1)).sqrt() * seen
    repel, attract = a.chunk(2, 2)
    pull, push = attract * repel.sum(2, keepdim=True), repel * attract.sum(2, keepdim=True)
    return torch.cat([-push, pull], 2) @ both  # coefficients of a row sum to 0
