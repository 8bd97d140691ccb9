"""Residual in, one number per row out. Plain l2 is `dumo.types.mean_square`."""

from dumo.types import PerSample, Sample


def adaptive(e: Sample, p: float, c: float) -> PerSample:
    """S / sg(S + c)^p with S the sum of squares of a row (MeanFlow, Eq. 22); p = 0 is plain l2, summed."""
    s = e.square().flatten(1).sum(1)
    return s / (s.detach() + c) ** p
