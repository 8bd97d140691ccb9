"""Arms rank by paired differences with Student's t; a noisy arm is never best; failed seeds are counted."""

from math import sqrt

import pytest
from scipy.stats import t as student_t
from scipy.stats import ttest_rel

from dumo.lab.ranking import ArmScore, PairedDifference, best_arms, failed_seeds, is_level, paired_difference

SEEDS = ("1", "2", "3")


def arm(*values: float, error: float = 0.1, seeds: tuple[str, ...] = SEEDS) -> ArmScore:
    """An arm with these distances by seed."""
    return ArmScore(dict(zip(seeds, values, strict=True)), error)


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 2 and 3: mean 2, deviation 1."""
    found = paired_difference({"1": 11.0, "2": 22.0, "3": 33.0}, {"3": 30.0, "1": 10.0, "2": 20.0})
    assert found == PairedDifference(2.0, 1 / sqrt(3), 3)
    assert found is not None
    assert found.margin == pytest.approx(4.3027 / sqrt(3), rel=1e-4)  # from a printed table, two degrees


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.5, 2.0])
def test_level_is_what_the_paired_t_test_does_not_tell_apart(shift: float) -> None:
    best = arm(1.0, 1.4, 0.8, 1.3, 0.9, seeds=("1", "2", "3", "4", "5"))
    noise = (0.1, -0.2, 0.3, 0.0, 0.05)
    values = [value + shift + off for value, off in zip(best.by_seed.values(), noise, strict=True)]
    other = arm(*values, seeds=tuple(best.by_seed))
    test = ttest_rel(values, list(best.by_seed.values()))
    assert is_level(other, best) == (test.pvalue > 0.05)
    found = paired_difference(other.by_seed, best.by_seed)
    assert found is not None
    assert found.mean / found.error == pytest.approx(test.statistic)
    assert found.margin / found.error == pytest.approx(student_t.ppf(0.975, 4))


def test_folds_that_move_all_arms_do_not_hide_a_difference() -> None:
    """Errors of the means overlap widely, but on each fold one arm is better by about one."""
    best = arm(10.0, 20.0, 30.0, error=5.8)
    worse = arm(11.0, 21.1, 30.9, error=5.8)
    assert best_arms([worse, best]) == [False, False]  # neither is known to a quarter
    assert not is_level(worse, best)
    assert best_arms([arm(11.0, 21.1, 30.9), arm(10.0, 20.0, 30.0)]) == [False, True]


def test_two_errors_are_too_few_for_three_seeds() -> None:
    """A difference of three of its errors: t of two degrees needs 4.3."""
    best = arm(10.0, 10.0, 10.0)
    worse = arm(10.0 + 3 - sqrt(3), 10.0 + 3, 10.0 + 3 + sqrt(3))  # mean 3, error 1
    assert best_arms([best, worse]) == [True, True]


@pytest.mark.parametrize(("mean", "error"), [(50, 22), (41, 21), (17, 11)])
def test_a_noisy_arm_is_not_best_though_nothing_tells_it_apart(mean: float, error: float) -> None:
    best = arm(7.0, 7.5, 8.0, error=0.3)
    spread = error * sqrt(3)
    noisy = arm(mean - spread, mean, mean + spread, error=error)
    assert is_level(noisy, best)
    assert best_arms([noisy, best]) == [False, True]


def test_an_error_of_a_quarter_is_the_most() -> None:
    assert best_arms([arm(1.0, 1.0, 1.0, error=0.25)]) == [True]
    assert best_arms([arm(1.0, 1.0, 1.0, error=0.2501)]) == [False]
    assert best_arms([arm(-1.0, -1.0, -1.0, error=0.1)]) == [False]  # an unbiased distance may be negative


def test_where_the_best_is_noisy_none_is_best() -> None:
    """A worse arm that is level with it, and known better, would seem to win."""
    best = arm(0.2, 0.3, 0.25, error=0.08)
    worse = arm(0.35, 0.3, 0.5, error=0.09)
    assert is_level(worse, best)
    assert best_arms([worse, best]) == [False, False]


def test_arms_without_two_common_seeds_are_compared_by_their_errors() -> None:
    best = arm(1.0, 1.0, 1.0)
    near = arm(1.2, error=0.1, seeds=("1",))
    far = arm(1.3, error=0.1, seeds=("1",))
    assert paired_difference(near.by_seed, best.by_seed) is None
    assert best_arms([best, near, far]) == [True, True, False]
    assert best_arms([best, arm(1.2, 1.2, 1.2, seeds=("7", "8", "9"))]) == [True, True]


def test_a_seed_fails_far_above_its_median_or_without_a_class() -> None:
    distances = {"0": 21.0, "1": 51.0, "2": 25.0}
    assert failed_seeds(distances, {}) == ["1"]
    assert failed_seeds({"0": 20.0, "1": 30.0, "2": 20.0}, {}) == []  # 1.5 times, and not above
    assert failed_seeds(distances, {"0": 0.59, "1": 0.7, "2": 0.6}) == ["0", "1"]
    assert failed_seeds(distances, {"0": 0.59, "1": 0.7, "2": 0.59}) == ["1"]  # an arm that has not learned the classes
    assert failed_seeds({"0": 45.9, "1": 89.7, "2": 44.7}, {}) == ["1"]  # not above 1.5 times their mean
    assert failed_seeds({"0": 500.0}, {}) == []  # one seed has no other to fail by
