"""Arms are compared by paired differences with Student's t."""

from math import sqrt

import pytest
from scipy.stats import t as student_t
from scipy.stats import ttest_rel

from dumo.lab.ranking import ArmScore, PairedDifference, is_tied, paired_difference

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
    assert is_tied(other, best) == (test.pvalue > 0.05)
    found = paired_difference(other.by_seed, best.by_seed)
    assert found is not None
    assert found.mean / found.error == pytest.approx(test.statistic)
    assert found.margin / found.error == pytest.approx(student_t.ppf(0.975, 4))


def test_folds_that_move_all_arms_do_not_hide_a_difference() -> None:
    """Errors of the means overlap widely, but on each fold one arm is better by about one."""
    best = arm(10.0, 20.0, 30.0, error=5.8)
    worse = arm(11.0, 21.1, 30.9, error=5.8)
    assert not is_tied(worse, best)


def test_two_errors_are_too_few_for_three_seeds() -> None:
    """A difference of three of its errors: t of two degrees needs 4.3."""
    best = arm(10.0, 10.0, 10.0)
    worse = arm(10.0 + 3 - sqrt(3), 10.0 + 3, 10.0 + 3 + sqrt(3))  # mean 3, error 1
    assert is_tied(worse, best)


def test_arms_without_two_common_seeds_are_compared_by_their_errors() -> None:
    best = arm(1.0, 1.0, 1.0)
    near = arm(1.2, error=0.1, seeds=("1",))
    far = arm(1.3, error=0.1, seeds=("1",))
    assert paired_difference(near.by_seed, best.by_seed) is None
    assert (is_tied(near, best), is_tied(far, best)) == (True, False)
    assert is_tied(arm(1.2, 1.2, 1.2, seeds=("7", "8", "9")), best)
