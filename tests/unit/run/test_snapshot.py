"""Averages made after training are those that would have been kept, as nearly as the profiles of snapshots tell."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from dumo.run.average import Profile, fit, mixed, overlap
from dumo.training.ema import exponent

STEPS = 400
KEPT = [Profile(step, std) for step, std in product(range(50, STEPS + 1, 50), (0.05, 0.1))]


def test_overlaps_are_the_integrals() -> None:
    tau = (np.arange(100_000) + 0.5) / 100
    for one, other in ((Profile(300, 0.1), Profile(700, 0.05)), (Profile(500, 0.2), Profile(500, 0.05))):
        first, second = (
            (exponent(p.std) + 1) * (tau / p.step) ** exponent(p.std) / p.step * (tau < p.step) for p in (one, other)
        )
        assert overlap(one, other) == pytest.approx((first * second).sum() / 100, rel=1e-4)
        assert overlap(one, other) == overlap(other, one)


@pytest.mark.parametrize("known", KEPT[::5])
def test_a_snapshot_is_found_again(known: Profile) -> None:
    x, error = fit(KEPT, known)
    assert x == pytest.approx([float(one == known) for one in KEPT], abs=1e-9)
    assert error < 1e-6


def test_weights_that_rest_stay() -> None:
    for std in (0.01, 0.04, 0.25):
        assert sum(fit(KEPT, Profile(STEPS, std))[0]) == pytest.approx(1, abs=1e-12)


def test_more_snapshots_are_nearer() -> None:
    """An error that falls by the square of their number."""
    errors = []
    for count in (8, 16, 32):
        kept = [Profile(step, std) for step, std in product(range(3200 // count, 3201, 3200 // count), (0.05, 0.1))]
        errors.append(fit(kept, Profile(3200, 0.12))[1])
    assert all(3 < a / b < 5 for a, b in pairwise(errors))


def test_what_is_not_averaged_is_the_last_ones() -> None:
    snapshots = [{"w": torch.full((2,), i, dtype=torch.float32), "count": torch.tensor(i)} for i in (1, 2)]
    found = mixed(snapshots, [0.25, 0.5], {"w"})
    assert torch.equal(found["w"], torch.full((2,), 1.25))
    assert found["count"].item() == 2
