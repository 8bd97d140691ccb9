"""The tables of the pages: a noisy arm is never best, failed seeds are counted, and powers have an error."""

import runpy
from math import sqrt
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch

import measured
from dumo.lab.ranking import ArmScore, is_tied

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "docs/tables.py"))
best_arms, failed_seeds, fit_power_law = (TOOL[name] for name in ("best_arms", "failed_seeds", "fit_power_law"))


def arm(*values: float, error: float = 0.1) -> ArmScore:
    """An arm with these distances by seed."""
    return ArmScore(dict(zip(("1", "2", "3"), values, strict=True)), error)


@pytest.mark.parametrize(("mean", "error"), [(50, 22), (41, 21), (17, 11)])
def test_a_noisy_arm_is_not_best_though_nothing_tells_it_apart(mean: float, error: float) -> None:
    best = arm(7.0, 7.5, 8.0, error=0.3)
    spread = error * sqrt(3)
    noisy = arm(mean - spread, mean, mean + spread, error=error)
    assert is_tied(noisy, best)
    assert best_arms([noisy, best]) == [False, True]


def test_an_error_of_a_quarter_is_the_most() -> None:
    assert best_arms([arm(1.0, 1.0, 1.0, error=0.25)]) == [True]
    assert best_arms([arm(1.0, 1.0, 1.0, error=0.2501)]) == [False]
    assert best_arms([arm(-1.0, -1.0, -1.0, error=0.1)]) == [False]  # an unbiased distance may be negative


def test_where_the_best_is_noisy_none_is_best() -> None:
    """A worse arm that is level with it, and known better, would seem to win."""
    best = arm(0.2, 0.3, 0.25, error=0.08)
    worse = arm(0.35, 0.3, 0.5, error=0.09)
    assert is_tied(worse, best)
    assert best_arms([worse, best]) == [False, False]


def test_a_seed_fails_far_above_its_median_or_without_a_class() -> None:
    distances = {"0": 21.0, "1": 51.0, "2": 25.0}
    assert failed_seeds(distances, {}) == ["1"]
    assert failed_seeds({"0": 20.0, "1": 30.0, "2": 20.0}, {}) == []  # 1.5 times, and not above
    assert failed_seeds(distances, {"0": 0.59, "1": 0.7, "2": 0.6}) == ["0", "1"]
    assert failed_seeds(distances, {"0": 0.59, "1": 0.7, "2": 0.59}) == ["1"]  # an arm that has not learned the classes
    assert failed_seeds({"0": 45.9, "1": 89.7, "2": 44.7}, {}) == ["1"]  # not above 1.5 times their mean
    assert failed_seeds({"0": 500.0}, {}) == []  # one seed has no other to fail by


def test_an_arm_that_is_level_with_the_best_is_best() -> None:
    assert best_arms([arm(11.0, 21.1, 30.9), arm(10.0, 20.0, 30.0)]) == [False, True]
    assert best_arms([arm(10.0, 10.0, 10.0), arm(10.0, 12.0, 14.0)]) == [True, True]


def test_an_arm_far_behind_the_best_is_not_best_however_large_its_error() -> None:
    best = arm(3.0, 3.5, 3.6, error=0.6)
    far = arm(18.0, 28.7, 39.4, error=6.1)
    assert is_tied(far, best)
    assert best_arms([far, best]) == [False, True]
    assert best_arms([arm(10.0, 10.0, 10.0), arm(12.5 - sqrt(3), 12.5, 12.5 + sqrt(3))]) == [True, True]
    assert best_arms([arm(10.0, 10.0, 10.0), arm(12.51 - sqrt(3), 12.51, 12.51 + sqrt(3))]) == [True, False]


def test_the_error_of_a_power_is_its_scatter_over_points_redrawn() -> None:
    """Points of errors of one percent and two, about a power of -1.5."""
    g = torch.Generator().manual_seed(0)
    points = [(x, x**-1.5, sd * x**-1.5) for x, sd in ((1, 0.01), (3, 0.02), (10, 0.01))]
    power, error = fit_power_law(points)
    draws = (torch.randn(3, generator=g).tolist() for _ in range(2000))
    found = [fit_power_law([(x, y + sd * e, sd) for (x, y, sd), e in zip(points, es, strict=True)])[0] for es in draws]
    assert power == pytest.approx(-1.5)
    assert stdev(found) == pytest.approx(error, rel=0.06)


def test_a_power_is_fitted_over_the_same_budgets_for_every_seed() -> None:
    """A seed with one more budget than the others, there far off the line, is the only one that is fitted."""
    cells: list[dict[str, Any]] = []
    for seed, budgets in (("0", (1, 10, 100)), ("1", (1, 10))):
        for budget in budgets:
            row = {"nfe": 1, "solver": "hop", "class_mmd": 0.5 if budget == 100 else budget**-0.5, "class_mmd_sd": 0.01}
            cells.append({"cell": f"arm-{budget}-{seed}", "protocol": "p", "results": [row], "contrast": []})
    table = [{"arm": "arm", "budget": budget} for budget in (1, 10, 100)]
    [power] = TOOL["_powers"]({"cells": cells, "table": table}).values()
    assert power.startswith("−0.15")


@pytest.mark.parametrize("name", measured.names())
def test_a_stored_table_is_the_means_of_its_cells(name: str) -> None:
    found = measured.results(name)
    for stored, again in zip(found["table"], TOOL["from_cells"](found), strict=True):
        if name != "fig3":
            assert again["fd"] == pytest.approx(stored["fd"])
            assert sum(row["fd"] for row in again["by_seed"].values()) == pytest.approx(again["seeds"] * again["fd"])
