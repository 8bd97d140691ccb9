"""A machine that tells two sets apart: chance where they are of one law, certainty where they do not mix."""

import pytest
import torch
from torch import Tensor

from dumo.evaluation.distance import two_sample_auc
from dumo.runtime.random import stream


def normal(n: int, key: str, d: int = 2) -> Tensor:
    return torch.randn(n, d, generator=stream(key))


def auc(real: Tensor, fake: Tensor) -> float:
    return two_sample_auc(real, fake, stream("auc"))


def test_one_law_is_chance_and_no_overlap_is_certain() -> None:
    """Chance whatever the sizes: rows that were learned are not asked about."""
    real = normal(300, "real", 40)
    assert auc(real, normal(300, "fake", 40)) == pytest.approx(0.5, abs=0.08)
    assert auc(real, normal(900, "many", 40)) == pytest.approx(0.5, abs=0.08)
    assert auc(normal(50, "a"), normal(80, "b") + 100) == 1


def test_a_shift_between_gaussians_is_the_best_test_s() -> None:
    """Nothing orders them better than the likelihood: Phi(delta / sqrt 2) = 0.76 for delta = 1."""
    assert auc(normal(1500, "real"), normal(1500, "fake") + torch.tensor([1.0, 0.0])) == pytest.approx(0.76, abs=0.03)


def test_what_no_line_divides() -> None:
    """A ring around its middle has the same mean, so it takes a kernel."""
    ring = torch.nn.functional.normalize(normal(400, "ring")) * 3
    assert auc(normal(400, "middle") * 0.5, ring) > 0.99


def test_it_repeats_and_takes_images() -> None:
    x, y = normal(40, "x", 16), normal(30, "y", 16) + 0.3
    assert auc(x, y) == auc(x, y) == auc(x.view(40, 1, 4, 4), y.view(30, 1, 4, 4))
