"""How the arms of a table rank: which are best, by differences paired by seed, and which of their seeds failed.

Arms that ran on one seed saw the same noise and were judged by the same images. What these add to both drops out of
their difference, which scatters less than either. Of n common seeds with differences d_i the mean lies within

    t(0.975, n - 1) * stdev(d) / sqrt(n)

of the true one in 95 of 100 cases (Student 1908): the quantile is 12.7 for two seeds, 4.3 for three, 2.8 for five.
Arms with fewer than two seeds in common are compared by their standard errors, as `dumo compare` does.

`best_arms` and `failed_seeds` are the entrances; docs/tables.py marks its tables by them. A plan of the user's own
(`dumo.lab.ownplan`) marks all arms that are level with the best, by `is_level`, and shows the differences next to them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median, stdev

from dumo.evaluation.estimate import Estimate, ties_with_least

CONFIDENCE = 0.95
_MAX_RELATIVE_ERROR = 0.25  # of the mean of an arm that may be called best: ours
_FAILED_RATIO = 1.5  # of a seed's distance to the median of its arm, above which the seed has failed: ours
MIN_ACCURACY = 0.6  # of a seed's samples of CIFAR-10, by the shipped classifier, below which it has failed: ours


@dataclass(frozen=True)
class ArmScore:
    """The distance of an arm from the data, where the least is best."""

    by_seed: Mapping[str, float]
    error: float  # the standard error of the mean over seeds

    @property
    def mean(self) -> float:
        """The mean distance over all seeds, failed ones included."""
        return fmean(self.by_seed.values())

    @property
    def estimate(self) -> Estimate:
        """The mean with its error."""
        return Estimate(self.mean, self.error)


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two arms, seed by seed."""

    mean: float
    error: float  # the standard error of the mean
    pairs: int  # the seeds that both arms have

    @property
    def margin(self) -> float:
        """Half the length of the interval that holds the true mean with probability CONFIDENCE."""
        from scipy.stats import t as student_t  # slow to import

        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, self.pairs - 1))
        return quantile * self.error


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> PairedDifference | None:
    """The difference a - b of distances by seed; None where fewer than two seeds are in both."""
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    pairs = len(differences)
    if pairs < 2:
        return None
    return PairedDifference(fmean(differences), stdev(differences) / sqrt(pairs), pairs)


def is_level(arm: ArmScore, best: ArmScore) -> bool:
    """Whether the difference of an arm from the best one may be chance."""
    difference = paired_difference(arm.by_seed, best.by_seed)
    if difference is None:
        return ties_with_least([best.estimate, arm.estimate])[1]
    return difference.mean <= difference.margin


def best_arms(arms: Sequence[ArmScore]) -> list[bool]:
    """Whether each arm is the best one or level with it, and precise, its error within a quarter of its mean.

    Where the best arm is not precise, none counts as best: a worse but more precise arm would seem to win.
    """
    best = min(arms, key=lambda arm: arm.mean)
    if not _is_precise(best):
        return [False] * len(arms)
    return [_is_precise(arm) and is_level(arm, best) for arm in arms]


def _is_precise(arm: ArmScore) -> bool:
    """Whether the standard error is within _MAX_RELATIVE_ERROR of the mean."""
    return arm.error <= _MAX_RELATIVE_ERROR * arm.mean


def failed_seeds(distances: Mapping[str, float], accuracies: Mapping[str, float]) -> list[str]:
    """The seeds of an arm that have failed at one NFE, by their distances and accuracies.

    Their distance is above 1.5 times the arm's median, or their accuracy is below 0.6 while the arm's median is not.
    `accuracies` is empty where accuracy does not count.
    """
    max_distance = _FAILED_RATIO * median(distances.values())
    counts_accuracy = bool(accuracies) and median(accuracies.values()) >= MIN_ACCURACY  # else no seed has learned yet
    failed: list[str] = []
    for seed, distance in distances.items():
        is_wrong = counts_accuracy and accuracies[seed] < MIN_ACCURACY
        if distance > max_distance or is_wrong:
            failed.append(seed)
    return failed
