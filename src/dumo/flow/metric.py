"""Residual in, one number per row out. Plain l2 is `dumo.types.mean_square`."""

from dumo.types import PerSample, Sample, mean_square


def adaptive(e: Sample, p: float, c: float) -> PerSample:
    """S / sg(S + c)^p with S the sum of squares of a row (MeanFlow, Eq. 22); p = 0 is plain l2, summed."""
    s = e.square().flatten(1).sum(1)
    return s / (s.detach() + c) ** p


def beyond(e: Sample, bound: float = 1.0) -> PerSample:
    """Share of a row's entries with |e| > bound: what a clamp of the residual would cut, at 1 in UCGM and RCGM."""
    return (e.detach().abs() > bound).flatten(1).float().mean(1)


def apart(v_error: Sample, u_error: Sample) -> PerSample:
    """Mean square of v_hat - (u_hat + t du/dt), for v* - u* = t du/dt: how far two heads are from DuMo's identity.

    Along v*, so it holds the scatter of v* about the velocity; the drift of `dumo.train.probe` does not.
    """
    return mean_square((v_error - u_error).detach())
