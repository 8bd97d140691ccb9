"""Residual in, one number per row out. Plain l2 is `dumo.types.mean_square`."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dumo.place import index
from dumo.types import Guide, PerSample, Sample, mean_square

Contrast = Annotated[float, Field(ge=0, lt=1, exclude_if=lambda contrast: contrast == 0)]  # 0: none, and not written
SMALL = 1e-3  # ours: the length that a direction needs to count in full


def adaptive(e: Sample, p: float, c: float | Tensor, mean: bool = False) -> PerSample:
    """S / sg(S + c)^p with S the sum of squares of a row (MeanFlow, Eq. 22); p = 0 is plain l2, summed.

    With `mean` S is the mean of squares (SoFlow, alpha-Flow, FACM); c may differ from row to row.
    """
    s = mean_square(e) if mean else e.square().flatten(1).sum(1)
    return s / (s.detach() + c) ** p


def normalized(e: Sample, c: float) -> PerSample:
    """S / sg(sqrt(S) + c) with S the mean of squares: the gradient is that of a pull by e / (rms(e) + c) (sCM, AYF)."""
    s = mean_square(e)
    return s / (s.detach().sqrt() + c)


def rmse(e: Sample) -> PerSample:
    """Root of the mean of squares, of gradient 0 where it is 0: the Huber loss at c = 0."""
    return torch.linalg.vector_norm(e.flatten(1), dim=1) / e[0].numel() ** 0.5


def contrasted(loss: PerSample, v: Sample, v_star: Sample, strength: float) -> PerSample:
    """The loss |v - v*|^2 less `strength` times |v - v~*|^2, of the target v~* of the row's neighbour, in mean squares.

    Contrastive flow matching (Stoica et al. 2025), whose other row is any of the batch; here rows go by twos (ours).
    The least is at (v* - strength v~*) / (1 - strength): no velocity, but beyond it, away from the mean of all rows.
    """
    if not strength:
        return loss
    last = len(v) - 1
    neighbour = index([min(i ^ 1, last) for i in range(len(v))], v.device)
    return loss - strength * mean_square(v - v_star[neighbour])


def demand_unbent(strength: float, guide: Guide) -> None:
    """Refuse contrast with a ValueError where guidance asks the head that it moves away from the velocity."""
    if strength and guide.active:
        raise ValueError(
            "contrast moves the velocity head away from the velocity, and guide would ask it for that: use contrast=0, "
            "or no guidance in training (guide.omega=1, guide.zeta=0)"
        )


def huber(e: Sample, c: float) -> PerSample:
    """sqrt(S + c^2) - c with S the mean of squares: S / 2c if that is small beside c, else its root.

    UCGM's code, `methods/unigen.py`, loss_func. Written so that small S keep their digits.
    """
    s = mean_square(e)
    return s / ((s + c**2).sqrt() + c) if c else rmse(e)


def barron(e: Sample, alpha: float = 1.0, c: float = 1e-3) -> PerSample:
    """S sg(S / (c^2 |alpha - 2|) + 1)^(alpha / 2 - 1) / c with S the mean of squares: by default near its root.

    TwinFlow's code, `twinflow.py`, barron_reweighting_loss, and its 1e-8 beside c^2: the weight is that of Barron's
    loss (2019), the square is plain. alpha = 2 is plain l2, over c.
    """
    s = mean_square(e)
    scaled = s.detach() / (c**2 + 1e-8)
    weight = 1.0 if alpha == 2 else (scaled / abs(alpha - 2) + 1) ** (alpha / 2 - 1)
    return s * weight / c


def turned(u: Sample, w: Sample) -> PerSample:
    """1 - the cosine of the angle between u and w over channels, the first axis of a row, in mean over the others.

    UCGM's and FACM's codes; of one channel it knows the sign alone. Lengths below SMALL count as that, for a head that
    starts at zero has no direction, and would get gradients of 1e8. Written as half the square of the chord between the
    two directions, which is the same where they have length 1, and at rest where u = w whatever that is.
    """
    one, other = (a / (a.square().sum(1, keepdim=True) + SMALL**2).sqrt() for a in (u, w))
    return mean_square(one - other) * u.shape[1] / 2


def descending(u: Sample, g: Sample) -> Sample:
    """An error of value g, by whose mean square u descends g, which is held still."""
    return u - (u - g).detach()


def clipped_share(e: Sample, bound: float = 1.0) -> PerSample:
    """Share of a row's entries with |e| > bound: what a clamp of the residual would cut, at 1 in UCGM and RCGM."""
    return (e.detach().abs() > bound).flatten(1).float().mean(1)


def head_gap(v_error: Sample, u_error: Sample) -> PerSample:
    """Mean square of v_hat - (u_hat + t du/dt), for v* - u* = t du/dt: how far two heads are from DuMo's identity.

    Along v*, so it holds the scatter of v* about the velocity; the drift of `dumo.training.probe` does not.
    """
    return mean_square((v_error - u_error).detach())
