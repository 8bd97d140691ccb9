"""Teachers of the tests: what a user's function returns."""

import torch

from dumo.config.spec import Run
from dumo.types import Cond, Reads, Sample, Time, lift


def line(run: Run, device: torch.device) -> Reads:
    """A velocity known in closed form: of data that are one point, (1, -2), v = (x_t - point) / t."""

    def velocity(x: Sample, t: Time, c: Cond) -> Sample:
        return (x - torch.tensor([1.0, -2.0])) / lift(t, x)

    return Reads(velocity=velocity)


def mute(run: Run, device: torch.device) -> Reads:
    """It tells nothing."""
    return Reads()


def wrong(run: Run, device: torch.device) -> int:
    """No reading at all."""
    return 7
