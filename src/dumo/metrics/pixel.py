"""Samples as the colours that an image file holds."""

import torch

from dumo.metrics.inception import Pixels
from dumo.types import Sample, UserError


def to_pixels(x: Sample) -> Pixels:
    """Samples (n, 1 or 3, h, w) as colours 0 .. 255, grey in all three: -1 is 0, 1 is 255, rounded and clamped.

    Raises `UserError` for other shapes, and where x is not finite.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(f"samples of shape {tuple(x.shape[1:])} are no images of 1 or 3 channels: decode them first")
    if not x.isfinite().all():
        raise UserError("some samples are not finite numbers: train again with a lower rate, or clip the gradient")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
