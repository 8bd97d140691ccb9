"""Losses and metrics of a residual e = prediction - target, (b, ...).

- Losses (b,), one number per row: `adaptive_l2`, `normalized_l2`, `huber` and `rmse` of a residual, and
  `cosine_distance` of two velocities. Plain l2 is `dumo.types.mean_square`.
- `descent_error` returns a residual (b, ...) with a given gradient of its mean square.
- Metrics (b,), without gradients: `clipped_share` and `head_gap`.

sg(a) is a, detached.
"""

import torch
from torch import Tensor

from dumo.types import PerSample, Sample, mean_square

# The length, in units of the data, far below which a vector has no direction (`_direction`; our choice).
SMALL = 1e-3


def adaptive_l2(e: Sample, p: float, c: float | Tensor, *, mean: bool = False) -> PerSample:
    """Return S / sg(S + c)^p with S the sum of squares of a row (MeanFlow, Eq. 22); p = 0 is plain l2, summed.

    c: a number, or one per row (b,).
    mean: S is the mean of squares instead (SoFlow, alpha-Flow, FACM).
    """
    s = mean_square(e) if mean else e.square().flatten(1).sum(1)
    return s / (s.detach() + c) ** p


def normalized_l2(e: Sample, c: float) -> PerSample:
    """Return S / sg(sqrt(S) + c) with S the mean of squares: the gradient is (2/N) e / (rms(e) + c) (sCM, AYF).

    N is the number of entries of a row.
    """
    s = mean_square(e)
    return s / (s.detach().sqrt() + c)


def huber(e: Sample, c: float) -> PerSample:
    """Return sqrt(S + c^2) - c with S the mean of squares: about S / 2c for small S, and sqrt(S) for large S.

    UCGM's code, `methods/unigen.py`, loss_func, in a form without cancellation for small S.
    """
    # The form below would be 0/0 at S = 0, in value and gradient.
    if not c:
        return rmse(e)
    s = mean_square(e)
    return s / ((s + c**2).sqrt() + c)


def rmse(e: Sample) -> PerSample:
    """Return the root mean square of each row: the Huber loss at c = 0. Its gradient is 0 at 0."""
    return torch.linalg.vector_norm(e.flatten(1), dim=1) / e[0].numel() ** 0.5


def cosine_distance(u: Sample, w: Sample) -> PerSample:
    """Return 1 - the cosine of the angle between u and w over the channels (axis 1), averaged over the other axes.

    FACM's code. It is computed as half the squared distance of the normalized vectors, which is equal to it and has no
    gradient at u = w.
    """
    chord = _direction(u) - _direction(w)
    return mean_square(chord) * u.shape[1] / 2


def _direction(a: Sample) -> Sample:
    """Divide a (b, channels, ...) by sqrt(length^2 + SMALL^2), with its length along the channels.

    Without SMALL, a head that starts at zero would have gradients of 1e8.
    """
    return a / (a.square().sum(1, keepdim=True) + SMALL**2).sqrt()


def descent_error(u: Sample, g: Sample) -> Sample:
    """Return a residual with the value g and the gradient of u, so that its mean square moves u along -g."""
    return u - (u - g).detach()


def clipped_share(e: Sample, bound: float = 1.0) -> PerSample:
    """Return the share of a row's entries with |e| > bound, which UCGM and RCGM would clamp (at 1)."""
    return (e.detach().abs() > bound).flatten(1).float().mean(1)


def head_gap(v_error: Sample, u_error: Sample) -> PerSample:
    """Return the mean square of v_hat - (u_hat + t du/dt), the violation of DuMo's identity by two heads.

    v_error, u_error: prediction - target, with targets v* and u* = v* - t du/dt; their difference is the gap.

    du/dt is taken along v*, so the gap contains the variance of v* about the velocity, in contrast to the drift of
    `dumo.training.metrics`.
    """
    return mean_square((v_error - u_error).detach())
