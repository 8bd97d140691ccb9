"""Losses of a residual, and what is watched of one. A residual is e = prediction - target, (b, ...).

- Losses, (b,), one number per row: `adaptive_l2`, `normalized_l2`, `huber` and `rmse` of a residual, `cosine_distance`
  of two velocities. Plain l2 is `dumo.types.mean_square`.
- `descent_error` makes a residual (b, ...) whose mean square has a given gradient.
- Watched, (b,), without gradients: `clipped_share` and `head_gap`.

sg(a) is a, detached.
"""

import torch
from torch import Tensor

from dumo.types import PerSample, Sample, mean_square

# The length, in units of the data, far below which a vector counts as one without direction (`_direction`): ours
SMALL = 1e-3


def adaptive_l2(e: Sample, p: float, c: float | Tensor, *, mean: bool = False) -> PerSample:
    """S / sg(S + c)^p with S the sum of squares of a row (MeanFlow, Eq. 22); p = 0 is plain l2, summed.

    c: one number, or one per row (b,). mean: S is the mean of squares (SoFlow, alpha-Flow, FACM).
    """
    s = mean_square(e) if mean else e.square().flatten(1).sum(1)
    return s / (s.detach() + c) ** p


def normalized_l2(e: Sample, c: float) -> PerSample:
    """S / sg(sqrt(S) + c) with S the mean of squares: the gradient is (2/N) e / (rms(e) + c) (sCM, AYF).

    N is the number of entries of a row.
    """
    s = mean_square(e)
    return s / (s.detach().sqrt() + c)


def huber(e: Sample, c: float) -> PerSample:
    """sqrt(S + c^2) - c with S the mean of squares: S / 2c where S is small against c^2, else about its root.

    UCGM's code, `methods/unigen.py`, loss_func. Written so that small S keep their digits.
    """
    if not c:  # what follows is 0/0 at S = 0, in value and gradient
        return rmse(e)
    s = mean_square(e)
    return s / ((s + c**2).sqrt() + c)


def rmse(e: Sample) -> PerSample:
    """The root of the mean of squares of each row: the Huber loss at c = 0. Its gradient is 0 where it is 0."""
    return torch.linalg.vector_norm(e.flatten(1), dim=1) / e[0].numel() ** 0.5


def cosine_distance(u: Sample, w: Sample) -> PerSample:
    """1 - the cosine of the angle between u and w over the channels (axis 1), in mean over all other axes of a row.

    FACM's code; of one channel it knows the sign alone. Written as half the square of the chord between the two
    directions, which is equal where both have length 1, and has no gradient where u = w, whatever u is.
    """
    chord = _direction(u) - _direction(w)
    return mean_square(chord) * u.shape[1] / 2


def _direction(a: Sample) -> Sample:
    """a (b, channels, ...) over its length along the channels, which SMALL floors smoothly: sqrt(length^2 + SMALL^2).

    Without the floor, a head that starts at zero would have no direction, and gradients of 1e8.
    """
    return a / (a.square().sum(1, keepdim=True) + SMALL**2).sqrt()


def descent_error(u: Sample, g: Sample) -> Sample:
    """A residual for which the mean square pushes u along -g: its value is g, its gradient that of u; g is detached."""
    return u - (u - g).detach()


def clipped_share(e: Sample, bound: float = 1.0) -> PerSample:
    """Share of a row's entries with |e| > bound: what a clamp of the residual would cut, at 1 in UCGM and RCGM."""
    return (e.detach().abs() > bound).flatten(1).float().mean(1)


def head_gap(v_error: Sample, u_error: Sample) -> PerSample:
    """Mean square of v_hat - (u_hat + t du/dt): how far two heads are from DuMo's identity.

    v_error, u_error: prediction - target, where the targets are v* and u* = v* - t du/dt; their difference is the gap.

    du/dt is taken along v*, so the gap also has the variance of v* about the velocity. The drift that
    `dumo.training.metrics` measures has not.
    """
    return mean_square((v_error - u_error).detach())
