"""Scores expected from a perfect sampler, one that draws new real images, for comparison with measured ones.

`perfect_sampler_scores` gives them for a protocol that measures `mmd`, `class_mmd` and `fd`. For any other squared
distance, `measure_null_distance` compares random parts of the data with each other and returns a `NullDistance`, whose
`scaled_to` gives the expected score at the protocol's own numbers of samples and real images. `subset_scale` is for a
distance that is a mean over random subsets, as a KID is.

Kernel distances have no bias: a perfect sampler's are 0 in the mean, and only their spread is computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from dumo.evaluation.by_class import perfect_mmd_scores
from dumo.evaluation.estimate import mean_sd
from dumo.evaluation.frechet import Moments, frechet_distance
from dumo.evaluation.protocol import Scores
from dumo.runtime.random import stream
from dumo.types import Cond

MAX_PART_ROWS = 5000  # rows of a part, unless `min_part_rows` asks for more: ours
PART_PAIRS = 60  # pairs of parts that are compared; their spread is then known to a tenth: ours
MIN_ROWS_PER_FEATURE = 2.5  # of a Fréchet distance: Chong & Forsyth begin at 5,000 rows for 2,048 features


Scale = Callable[[int, int], float]  # of a distance between n and m rows of one distribution


def full_scale(n: int, m: int) -> float:
    """The scale of a squared distance between all of n and m rows."""
    return 1 / n + 1 / m


def subset_scale(num_subsets: int, subset_rows: int) -> Scale:
    """The scale of the mean of a kernel distance over random subsets of `subset_rows` rows of either side.

    Given all rows, the subsets are independent, and the expected distance of each is that of all rows. So the variance
    of their mean is, by the law of total variance,

        var(all rows) + (var(one subset) - var(all rows)) / num_subsets
    """

    def scale(n: int, m: int) -> float:
        of_all = full_scale(n, m)
        of_subset = full_scale(subset_rows, subset_rows)
        return (of_all**2 + (of_subset**2 - of_all**2) / num_subsets) ** 0.5

    return scale


class NullDistance(NamedTuple):
    """The squared distance of two independent samples of one distribution, of n and m rows, over its scale.

    The mean and the sd of this ratio depend on neither n nor m (`measure_null_distance`).
    """

    mean: float
    sd: float

    def scaled_to(self, num_samples: int, num_real: int, scale: Scale = full_scale) -> tuple[float, float]:
        """The mean and the sd of the distance, of this scale, between `num_samples` and `num_real` rows."""
        size = scale(num_samples, num_real)
        return self.mean * size, self.sd * size


def measure_null_distance(
    real_c: Cond,
    distance: Callable[[Tensor, Tensor], float],
    *,
    kind: str,
    min_part_rows: float,
    pairs: int = PART_PAIRS,
    scale: Scale = full_scale,
) -> NullDistance | None:
    """Compare disjoint random parts of the data, large ones and ones half as large, with each other.

    `real_c` (m,) are the classes of the data, and `distance`, of this `scale`, takes the row numbers of two parts. At
    least `pairs` pairs are compared. Draws are keyed by `kind`. Returns None if the small parts would have fewer than
    `min_part_rows` rows.

    Why the ratio depends on neither number of rows (ours; measured on digits from 128 rows to 898): moments of n rows
    are off by an error that falls as 1 / sqrt(n), and distances are squares of such errors, so

        FD(n) = FD_inf + bias / n    (Chong & Forsyth 2020, arXiv 1911.07023, Sec. 4)

    Between n and m rows of one distribution FD_inf is 0, and 1/n becomes 1/n + 1/m.

    Samples are made with the classes in turn, so each part has its share of each class. Random parts would also differ
    in their counts of the classes, on digits by more than in all else.
    """
    large_part_rows = max(MAX_PART_ROWS, 2 * min_part_rows)
    num_large_parts = max(2, int(len(real_c) // large_part_rows))
    num_small_parts = 2 * num_large_parts
    if len(real_c) // num_small_parts < min_part_rows:
        return None
    pairs_per_round = num_large_parts // 2 + num_small_parts // 2
    num_rounds = -(-pairs // pairs_per_round)
    ratios: list[float] = []
    for i in range(num_rounds):
        for num_parts in (num_large_parts, num_small_parts):
            parts = random_parts(real_c, num_parts, stream(kind, "parts", num_parts, i))
            for a, b in zip(parts[::2], parts[1::2], strict=False):  # the last of an odd number has no partner
                ratios.append(distance(a, b) / scale(len(a), len(b)))
    mean, sd = mean_sd(ratios)
    return NullDistance(mean, sd)


def perfect_sampler_scores(
    kind: str,
    real: Float[Tensor, "m f"],
    *,
    width: float,
    sample_c: Int64[Tensor, " n"],
    real_c: Cond,
    kernel_rows: Int64[Tensor, " k"] | None = None,
    with_frechet: bool = True,
) -> Scores:
    """The scores of a perfect sampler that makes images of the classes `sample_c`, each with its sd.

    They are `mmd`, as `mean` and `sd`; `class_mmd`, if samples are judged by class; and `fd`, if there are rows enough
    to estimate it, and never where `with_frechet` is false. `real` are features of the data in classes `real_c` (m,),
    `width` is that of the Gaussian kernel. Kernel distances compare with the rows `kernel_rows`; None: with all.
    """
    kernel_real = real
    kernel_real_c = real_c
    if kernel_rows is not None:
        kernel_real = real[kernel_rows]
        kernel_real_c = real_c[kernel_rows]
    scores = perfect_mmd_scores(kernel_real, width=width, sample_c=sample_c, real_c=kernel_real_c)
    if not with_frechet:
        return scores

    def distance(a: Tensor, b: Tensor) -> float:
        return frechet_distance(Moments.of(real[a]), Moments.of(real[b]))

    min_part_rows = MIN_ROWS_PER_FEATURE * real.shape[1]
    null_frechet = measure_null_distance(real_c, distance, kind=kind, min_part_rows=min_part_rows)
    if null_frechet:
        scores["fd"], scores["fd_sd"] = null_frechet.scaled_to(len(sample_c), len(real))
    return scores


def random_parts(c: Cond, num_parts: int, generator: Generator) -> list[Tensor]:
    """Split the rows of c (n,), at random, into disjoint parts; returns the row numbers of each part.

    The parts have as many rows, and as many rows of each class, give or take one.
    """
    order = torch.randperm(len(c), generator=generator)
    order = order[c[order].argsort(stable=True)]
    return [order[i::num_parts] for i in range(num_parts)]
