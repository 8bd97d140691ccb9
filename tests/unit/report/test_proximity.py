"""The nearest image is the nearest, and a copy is called one."""

import pytest
import torch
from torch import Tensor

from dumo.config.load import load
from dumo.data import Digits
from dumo.report.proximity import measure_proximity
from dumo.runtime.random import stream

PHOTOS = load("my-images", ["data.root=x", "data.classes=0"]).data


def drawn(n: int, key: str, side: int = 48) -> Tensor:
    """Smooth patches of colour, no two alike."""
    coarse = torch.rand(n, 3, 4, 4, generator=stream("proximity", key)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def test_a_planted_copy_is_found_and_called_one() -> None:
    """Also where it is a little noisy, and mirrored; its image is then shown mirrored."""
    real = drawn(60, "real")
    noise = 0.02 * torch.randn(3, 48, 48, generator=stream("noise"))
    x = torch.cat([drawn(4, "new"), (real[17] + noise)[None], (real[5] + noise).flip(-1)[None]])
    found = measure_proximity(PHOTOS, x, real, 0)
    assert found.is_copy == [False] * 4 + [True] * 2
    assert found.num_copies == 2
    assert torch.equal(found.nearest[4], real[17])
    assert torch.equal(found.nearest[5], real[5].flip(-1))
    assert max(found.ratios[4:]) < 0.2 < 0.5 < min(found.ratios[:4])
    assert found.num_real == 60


def test_new_images_of_the_same_law_are_about_one_apart() -> None:
    real = drawn(200, "real")
    assert measure_proximity(PHOTOS, drawn(80, "new"), real, 0).mean_ratio == pytest.approx(1, abs=0.1)
    x, _ = Digits().originals().reference(1, 0)
    noise = torch.randn(80, 1, 8, 8, generator=stream("noise"))
    assert measure_proximity(Digits(), noise, x, 0).mean_ratio > 3


def test_digits_have_no_mirror_images() -> None:
    x, _ = Digits().originals().reference(1, 0)
    found = measure_proximity(Digits(), x[100:110].flip(-1), x, 0)
    assert found.num_copies == 0
    assert measure_proximity(Digits(), x[100:110], x, 0).num_copies == 10


@pytest.mark.parametrize("size", [1, 2, 7])
def test_little_data_is_compared_as_far_as_it_goes(size: int) -> None:
    found = measure_proximity(PHOTOS, drawn(20, "new"), drawn(size, "real"), 0)
    assert len(found.ratios) == len(found.is_copy) == len(found.nearest) == 20
    assert torch.tensor(found.ratios).isnan().all() == (size == 1)


def test_images_that_are_there_twice_have_no_unit() -> None:
    real = drawn(1, "real").expand(4, -1, -1, -1)
    assert torch.tensor(measure_proximity(PHOTOS, drawn(3, "new"), real, 0).ratios).isnan().all()
