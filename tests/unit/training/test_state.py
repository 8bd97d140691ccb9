"""A training that is lost is told from one that is noisy."""

import math
from itertools import repeat

import pytest
import torch

from dumo.runtime.random import stream
from dumo.training.state import DECAY, FAR, Trend


def after(*errors: float) -> Trend:
    """The trend of these steps."""
    trend = Trend()
    for error in errors:
        trend = trend.after(error)
    return trend


def test_the_trend_is_a_geometric_mean_of_the_latest() -> None:
    """Nothing yet is good; no number changes nothing, and nothing nothing for good; it survives JSON."""
    assert Trend().is_good
    assert after(4.0, *repeat(0.5, 20)).level == pytest.approx(0.5 * (4 / 0.5) ** (DECAY**20))
    assert after(3.0).level == after(3.0).lowest == 3.0
    trend = after(0.1, 0.7, 1 / 3)
    assert trend.after(math.nan) == trend.after(math.inf) == trend
    assert 0 < (trend.after(0.0).level or 0) < math.inf
    assert Trend.model_validate_json(trend.model_dump_json()) == trend


def test_a_bad_batch_is_no_change_of_course() -> None:
    noisy = torch.randn(1000, generator=stream("trend")).mul(0.7).exp().tolist()
    noisy[500] = 1e6
    assert all(after(*noisy[:n]).is_good for n in (10, 501, 502, 1000))


@pytest.mark.parametrize("factor", [20.0, 1e5])
def test_what_is_lost_is_seen_and_what_comes_back(factor: float) -> None:
    well = [*repeat(0.3, 50)]
    assert not after(*well, *repeat(0.3 * factor, 60)).is_good
    assert after(*well, *repeat(0.3 * factor, 60), *repeat(0.3, 60)).is_good
    assert after(*well, *repeat(0.3 * 0.9 * FAR, 500)).is_good
