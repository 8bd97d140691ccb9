"""Compare arms by differences paired by seed.

Arms with the same seed were trained with the same noise and evaluated against the same images. These effects cancel in
the difference, so its variance is smaller. With differences d_i over n common seeds, the 95 % confidence interval of
the mean difference is

    mean(d) ± t(0.975, n - 1) stdev(d) / sqrt(n)

(Student 1908); the quantile is 12.7 for two seeds, 4.3 for three and 2.8 for five. Arms with fewer than two common
seeds are compared by their standard errors, as in `dumo compare`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from dumo.evaluation.estimate import Estimate, ties_with_least

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ArmScore:
    """The distance of an arm from the data; lower is better."""

    by_seed: Mapping[str, float]
    # The standard error of the mean over seeds.
    error: float

    @property
    def mean(self) -> float:
        """The mean distance over all seeds."""
        return fmean(self.by_seed.values())

    @property
    def estimate(self) -> Estimate:
        """The mean with its standard error."""
        return Estimate(self.mean, self.error)


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference of two arms over their common seeds."""

    mean: float
    # The standard error of the mean.
    error: float
    # The number of common seeds.
    num_seeds: int

    @property
    def margin(self) -> float:
        """Half the width of the confidence interval of the mean."""
        from scipy.stats import t as student_t  # slow to import

        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, self.num_seeds - 1))
        return quantile * self.error


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> PairedDifference | None:
    """Return the difference a - b of distances by seed; None if they have fewer than two seeds in common."""
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    num_seeds = len(differences)
    if num_seeds < 2:
        return None
    return PairedDifference(fmean(differences), stdev(differences) / sqrt(num_seeds), num_seeds)


def is_tied(arm: ArmScore, best: ArmScore) -> bool:
    """Whether an arm is not significantly worse than the best one."""
    difference = paired_difference(arm.by_seed, best.by_seed)
    if difference is None:
        return ties_with_least([best.estimate, arm.estimate])[1]
    return difference.mean <= difference.margin
