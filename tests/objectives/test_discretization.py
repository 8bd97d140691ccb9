"""Discretizations of neighbouring times against their authors' formulas, which are in noise levels."""

from itertools import pairwise
from math import erf, log, sqrt

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dumo.objectives.consistency import Discretization, KarrasGrid, Ratio
from dumo.types import Spec

D = torch.float64
ALL: list[Spec] = [Ratio(), Ratio(q=256, stages=1), KarrasGrid(), KarrasGrid(growth="root", first=2, last=150)]
T = torch.linspace(0.003, 0.994, 400, dtype=D)


def level(t: Tensor) -> Tensor:
    """sigma, for data of standard deviation 0.5."""
    return 0.5 * t / (1 - t)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_r_is_below_t_and_both_are_times(schedule: Discretization, progress: float, dtype: torch.dtype) -> None:
    t, r = schedule(T.to(dtype), progress)
    assert t.dtype == r.dtype == dtype
    assert ((r >= 0) & (r < t) & (t < 1)).all()
    t, r = schedule(torch.tensor([0.0, 1.0], dtype=dtype), progress)
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()


@pytest.mark.parametrize("schedule", ALL)
def test_steps_get_shorter(schedule: Discretization) -> None:
    steps = [(t - r).mean() for t, r in (schedule(T, p) for p in (0.0, 0.25, 0.5, 1.0))]
    if getattr(schedule, "stages", 0) == 1:
        assert len({step.item() for step in steps}) == 1
    else:
        assert all(a > 1.3 * b for a, b in pairwise(steps))


@pytest.mark.parametrize(("progress", "stage"), [(0.0, 0), (0.124, 0), (0.126, 1), (0.99, 7), (1.0, 7)])
def test_ratio_is_that_of_ect(progress: float, stage: int) -> None:
    """`training/loss.py`: sigma_r = sigma_t (1 - q^-(stage + 1) (1 + 8 sigmoid(-sigma_t))), at least 0."""
    t, r = Ratio()(T, progress)
    assert t is T
    sigma = level(T)
    ratio = 1 - (1 + 8 * torch.sigmoid(-sigma)) / 2 ** (stage + 1)
    assert torch.allclose(level(r), sigma * ratio.clamp(min=0), rtol=1e-9, atol=1e-12)
    if stage == 0:
        assert (r == 0).double().mean() > 0.7


def test_grid_is_that_of_karras() -> None:
    """Levels by Eq. 5 of Karras et al., and every t inside its step; the lowest level is 0."""
    n = 20
    edge = torch.tensor([(0.002 ** (1 / 7) + i / n * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(n + 1)])
    t, r = KarrasGrid(first=n, last=n)(T, 0.5)
    inside = level(T)
    for sigma, top, bottom in zip(inside, level(t), level(r), strict=True):
        i = min(max(int((edge.to(D) <= sigma).sum()), 1), n)
        assert top == pytest.approx(edge[i].item(), rel=1e-5)
        assert bottom == pytest.approx(edge[i - 1].item() if i > 1 else 0.0, rel=1e-5)


def test_numbers_of_steps() -> None:
    """iCT's double from 10 to 1280 (its Sec. 3.4); CM's grow with the root, 1 to 150 (its App. C)."""
    ict, cm = KarrasGrid(), KarrasGrid(growth="root", first=2, last=150)
    assert [ict.steps(k / 8) for k in range(9)] == [10, 20, 40, 80, 160, 320, 640, 1280, 1280]
    assert ict.steps(0.124) == 10
    assert [cm.steps(p) for p in (0.0, 1e-4, 0.25, 1.0)] == [1, 2, 75, 150]
    assert KarrasGrid(first=7, last=7).steps(1.0) == 7


def test_a_log_normal_becomes_the_discretised_one_of_ict() -> None:
    """Its Sec. 3.5: a step is as likely as erf of its top less erf of its bottom, of (log sigma + 1.1) / sqrt(8)."""
    share = (torch.arange(40000, dtype=D) + 0.5) / 40000
    s = torch.exp(-1.1 + log(2) + 2 * torch.special.ndtri(share))
    t, r = KarrasGrid()(s / (1 + s), 0.0)
    tops = level(t).unique()
    assert len(tops) == 10
    assert level(r).unique()[1:] == pytest.approx(tops[:-1], rel=1e-9)
    edges = [0.002, *tops.tolist()]
    bell = [erf((log(sigma) + 1.1) / (2 * sqrt(2))) for sigma in edges]
    for i in range(1, 9):  # the outermost have the tails
        assert (level(t) == tops[i]).double().mean().item() == pytest.approx((bell[i + 1] - bell[i]) / 2, abs=1e-4)
    tails = (1 + bell[0]) / 2 + (1 - bell[-1]) / 2
    assert tails == pytest.approx(0.008, abs=1e-3)


@pytest.mark.parametrize("fields", [{"first": 20, "last": 10}, {"first": 0}])
def test_a_grid_that_is_none_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        KarrasGrid(**fields)  # pyright: ignore[reportArgumentType]
