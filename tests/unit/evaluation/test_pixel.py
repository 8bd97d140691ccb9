"""The Fréchet distance of pixels against its closed form, and what the reduction leaves of an image."""

import pytest
import torch
from torch import Tensor

from dumo.evaluation.distance import pixel_frechet, reduced
from dumo.runtime.random import stream
from dumo.types import UserError


def crossed(mean: Tensor, sd: Tensor) -> Tensor:
    """Images mean +- sd_i e_i, in pairs: their mean is exact, and pixel i has variance 2 sd_i^2 / (2 d - 1), alone."""
    d = mean.numel()
    steps = torch.diag(sd.flatten())
    return (mean.flatten() + torch.cat([steps, -steps])).view(2 * d, *mean.shape)


def test_closed_form() -> None:
    """Of pixels that do not covary the distance is |m - n|^2 + sum (s_i - t_i)^2."""
    draws, shape = stream("pixel"), (1, 8, 8)
    m, n, s, t = (torch.rand(shape, generator=draws, dtype=torch.float64) for _ in range(4))
    expected = (m - n).square().sum() + (s - t).square().sum() * 2 / (2 * 64 - 1)
    assert pixel_frechet(crossed(m, s), crossed(n, t)) == pytest.approx(expected.item(), rel=1e-9)


def test_small_images_stay_as_they_are() -> None:
    x = torch.rand(3, 1, 8, 8, generator=stream("small"))
    assert torch.equal(reduced(x), x.double().flatten(1))


def test_reduction_is_the_mean_of_areas() -> None:
    """Enlarging pixel by pixel is undone, so sets at other sizes are compared; detail inside a square is not seen."""
    x = torch.rand(5, 3, 4, 4, generator=stream("areas"), dtype=torch.float64)
    large = x.repeat_interleave(16, 2).repeat_interleave(16, 3)
    checks = torch.ones(64, 64, dtype=torch.float64)
    checks[::2, 1::2], checks[1::2, ::2] = -1, -1
    assert torch.allclose(reduced(large + checks, 4), x.flatten(1))


def test_too_few_images() -> None:
    x = torch.rand(20, 3, 8, 8, generator=stream("few"))
    with pytest.raises(UserError, match="20 samples cannot give a covariance of 192"):
        pixel_frechet(x, x)
    assert pixel_frechet(x, x, side=2) == pytest.approx(0, abs=1e-12)
