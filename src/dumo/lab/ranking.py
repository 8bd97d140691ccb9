"""Compare arms by differences paired by seed.

Arms with the same seed saw the same noise and were evaluated against the same images. What these add to both arms
cancels in the difference, whose variance is therefore smaller than that of either arm. With differences d_i over n
common seeds, the 95 % confidence interval of the mean difference is

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
        """The mean with its error."""
        return Estimate(self.mean, self.error)


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two arms, seed by seed."""

    mean: float
    # The standard error of the mean.
    error: float
    # The number of seeds that both arms have.
    pairs: int

    @property
    def margin(self) -> float:
        """Half the width of the confidence interval of the mean."""
        from scipy.stats import t as student_t  # slow to import

        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, self.pairs - 1))
        return quantile * self.error


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> PairedDifference | None:
    """The difference a - b of distances by seed; None if fewer than two seeds are in both."""
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    pairs = len(differences)
    if pairs < 2:
        return None
    return PairedDifference(fmean(differences), stdev(differences) / sqrt(pairs), pairs)


def is_level(arm: ArmScore, best: ArmScore) -> bool:
    """Whether the difference between an arm and the best one is not significant."""
    difference = paired_difference(arm.by_seed, best.by_seed)
    if difference is None:
        return ties_with_least([best.estimate, arm.estimate])[1]
    return difference.mean <= difference.margin
