"""How far off a prediction is: a residual e (b, ...) in, one number per row (b,) out.

Losses: `adaptive_l2`, `normalized_l2`, `huber`, and `cosine_distance` of two directions; plain l2 is
`dumo.types.mean_square`. `descent_error` makes a residual of a gradient. `clipped_share` and `head_gap` are only
watched: they have no gradient.
"""

import torch
from torch import Tensor

from dumo.types import PerSample, Sample, mean_square

SMALL = 1e-3  # ours: the length, in units of the data, that a direction needs to count in full


def adaptive_l2(e: Sample, p: float, c: float | Tensor, mean: bool = False) -> PerSample:
    """S / sg(S + c)^p with S the sum of squares of a row (MeanFlow, Eq. 22); p = 0 is plain l2, summed.

    With `mean` S is the mean of squares (SoFlow, alpha-Flow, FACM); c may differ from row to row.
    """
    s = mean_square(e) if mean else e.square().flatten(1).sum(1)
    return s / (s.detach() + c) ** p


def normalized_l2(e: Sample, c: float) -> PerSample:
    """S / sg(sqrt(S) + c) with S the mean of squares: the gradient is that of a pull by e / (rms(e) + c) (sCM, AYF)."""
    s = mean_square(e)
    return s / (s.detach().sqrt() + c)


def huber(e: Sample, c: float) -> PerSample:
    """sqrt(S + c^2) - c with S the mean of squares: S / 2c where that is small against c, else its root.

    UCGM's code, `methods/unigen.py`, loss_func. Written so that small S keep their digits.
    """
    if not c:
        return rmse(e)
    s = mean_square(e)
    return s / ((s + c**2).sqrt() + c)


def rmse(e: Sample) -> PerSample:
    """Root of the mean of squares, of gradient 0 where it is 0: the Huber loss at c = 0."""
    return torch.linalg.vector_norm(e.flatten(1), dim=1) / e[0].numel() ** 0.5


def cosine_distance(u: Sample, w: Sample) -> PerSample:
    """1 - the cosine of the angle between u and w over channels, the first axis of a row, in mean over the others.

    FACM's code; of one channel it knows the sign alone. Lengths below SMALL count as SMALL, for a head that starts at
    zero has no direction, and would get gradients of 1e8. Written as half the square of the chord between the two
    directions: equal where they have length 1, and at rest where u = w, whatever u is.
    """
    chord = _direction(u) - _direction(w)
    return mean_square(chord) * u.shape[1] / 2


def _direction(a: Sample) -> Sample:
    """a (b, channels, ...) over its length along the channels."""
    return a / (a.square().sum(1, keepdim=True) + SMALL**2).sqrt()


def descent_error(u: Sample, g: Sample) -> Sample:
    """An error of value g whose mean square pushes u along -g; g is held still."""
    return u - (u - g).detach()


def clipped_share(e: Sample, bound: float = 1.0) -> PerSample:
    """Share of a row's entries with |e| > bound: what a clamp of the residual would cut, at 1 in UCGM and RCGM."""
    return (e.detach().abs() > bound).flatten(1).float().mean(1)


def head_gap(v_error: Sample, u_error: Sample) -> PerSample:
    """Mean square of v_hat - (u_hat + t du/dt), for v* - u* = t du/dt: how far two heads are from DuMo's identity.

    Along v*, so it holds the scatter of v* about the velocity; the drift of `dumo.training.record` does not.
    """
    return mean_square((v_error - u_error).detach())
