"""What a perfect sampler would have, one that makes new real images; and kernel distances by class.

`perfect` gives its scores `mmd` and `fd`, `perfect_by_class` its `class_mmd`, `distance_unit` any squared distance as a
function of the numbers of rows. `mmd` and `noise_by_class` measure samples and noise; `class_facts` says which classes
do not count. `random_parts` and `summarize` serve protocols that compare by random parts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from dumo.evaluation.distance import (
    Moments,
    class_mmd,
    class_mmd_deviation,
    class_shares,
    frechet_distance,
    gaussian_mmd,
    mean_sd,
    mmd_deviation,
    shared_classes,
)
from dumo.evaluation.metric import CLASS_MMD
from dumo.evaluation.protocol import Scores
from dumo.runtime.random import stream
from dumo.types import Cond

MAX_PART_ROWS = 5000  # rows of a part between which distances are measured, where `least` allows: ours
PART_PAIRS = 60  # of parts: the spread is known to a tenth. Ours
LEAST = 2.5  # rows for each feature: Chong & Forsyth begin at 5,000 for 2,048


class DistanceUnit(NamedTuple):
    """A distance of n rows to m others of one law, in units of 1/n + 1/m: what is no difference. Mean and spread."""

    mean: float
    sd: float

    def at(self, samples: int, reference: int, name: str = "", subsets: tuple[int, int] | None = None) -> Scores:
        """Those of a perfect sampler, which makes `samples` new real images, against `reference` of the data.

        As `mean` and `sd`, those of the first score, or, with the name of another, as NAME and NAME_sd. `subsets`: how
        many random subsets the score is the mean of, and their rows. Between two subsets the errors correlate as the
        rows do that they share, so that of the mean is between that of one and that of all.
        """
        of_all = 1 / samples + 1 / reference
        error = of_all
        if subsets:
            num_subsets, subset_rows = subsets
            of_one = 2 / subset_rows
            error = (of_all**2 + (of_one**2 - of_all**2) / num_subsets) ** 0.5
        if name:
            return {name: self.mean * of_all, f"{name}_sd": self.sd * error}
        return {"mean": self.mean * of_all, "sd": self.sd * error}


def distance_unit(
    c: Cond, distance: Callable[[Tensor, Tensor], float], kind: str, least: float, pairs: int = PART_PAIRS
) -> DistanceUnit | None:
    """The distance between disjoint parts of the data, whose classes are c, of two sizes: None of parts below `least`.

    `distance` takes the rows of both parts. The moments of n rows are off by a number times 1 / sqrt(n), and distances
    are squares: so FD = FD_inf + bias / n (Chong & Forsyth 2020, arXiv 1911.07023, Sec. 4), and between n and m rows of
    one law, where FD_inf is 0, it is 1/n + 1/m times a number whose law depends on neither (ours; measured on digits
    from 128 rows to 898). Samples come with the classes in turn, so each part has its share of each class: without,
    parts also differ in their counts of the classes, on digits more than in all else. Draws are keyed by `kind`.
    """
    few = max(2, int(len(c) // max(MAX_PART_ROWS, 2 * least)))  # parts; of the other size there are twice as many
    if len(c) // (2 * few) < least:
        return None
    rounds = -(-pairs // (few // 2 + few))
    values: list[float] = []
    for i in range(rounds):
        for count in (few, 2 * few):
            rows = random_parts(c, count, stream(kind, "parts", count, i))
            for a, b in zip(rows[::2], rows[1::2], strict=False):
                values.append(distance(a, b) / (1 / len(a) + 1 / len(b)))
    mean, sd = mean_sd(values)
    return DistanceUnit(mean, sd)


def mmd(
    fake: Float[Tensor, "b f"], real: Float[Tensor, "m f"], width: float, c: Cond, d: Int64[Tensor, " m"]
) -> Scores:
    """`mmd` and `class_mmd`, each with its standard error as NAME_sd, of rows of these classes.

    Without classes, and where no class has two images on both sides, there is no `class_mmd`.
    """
    if not _is_judged_by_class(c, d):
        pooled = gaussian_mmd(fake, real, width)
        return {"mmd": pooled.value, "mmd_sd": pooled.error}
    whole = gaussian_mmd(fake, real, width, c, d)
    by_class = class_mmd(fake, real, width, c, d)
    return {
        "mmd": whole.value,
        "mmd_sd": whole.error,
        CLASS_MMD: by_class.value,
        f"{CLASS_MMD}_sd": by_class.error,
    }


def _is_judged_by_class(c: Int64[Tensor, " n"], d: Int64[Tensor, " m"]) -> bool:
    """Whether samples of classes c and data of classes d have classes, and one of them two images on both sides."""
    return bool((c != c[0]).any()) and bool(shared_classes(c, d))


def class_facts(c: Int64[Tensor, " n"], d: Int64[Tensor, " m"]) -> dict[str, str]:
    """What a report says of the classes that `class_mmd` leaves out; nothing where it leaves out none."""
    if not (c != c[0]).any():
        return {}
    total = len(torch.cat([c.cpu(), d.cpu()]).unique())
    counted = len(shared_classes(c, d))
    if counted == total:
        return {}
    return {
        CLASS_MMD: f"{counted} of {total} classes: {total - counted} have fewer than 2 images on a side, and do not "
        "count"
    }


def noise_by_class(
    z: Float[Tensor, "b f"], real: Float[Tensor, "m f"], width: float, c: Int64[Tensor, " n"], d: Int64[Tensor, " m"]
) -> Scores:
    """`class_mmd` of noise z in place of the samples of each class; {} where samples are not judged by class."""
    if not _is_judged_by_class(c, d):
        return {}
    classes = shared_classes(c, d)
    distances = [gaussian_mmd(z, real[d == k], width).value for k in classes]
    return {CLASS_MMD: sum(p * x for p, x in zip(class_shares(d, classes), distances, strict=True))}


def perfect(
    kind: str,
    d: Cond,
    real: Float[Tensor, "m f"],
    samples: int,
    width: float,
    compared: int | None = None,
    c: Int64[Tensor, " n"] | None = None,
) -> Scores:
    """What a perfect sampler would have of `mmd`, as `mean` and `sd`, and of `fd` where there are rows enough to tell.

    `real` are the features of the data in classes d, of which the kernel distances take the first `compared`. With the
    classes c of the samples, `class_mmd` is among them, where samples are judged by class.
    """

    def distance(a: Tensor, b: Tensor) -> float:
        return frechet_distance(Moments.of(real[a]), Moments.of(real[b]))

    frechet_unit = distance_unit(d, distance, kind, LEAST * real.shape[1])
    some = real[:compared]
    some_d = d[:compared]
    scores = {"mean": 0.0, "sd": mmd_deviation(samples, some, width, some_d)}
    if c is not None:
        scores |= perfect_by_class(c, some, width, some_d)
    if frechet_unit:
        scores |= frechet_unit.at(samples, len(real), "fd")
    return scores


def perfect_by_class(
    c: Int64[Tensor, " n"], real: Float[Tensor, "m f"], width: float, d: Int64[Tensor, " m"]
) -> Scores:
    """`class_mmd` of a perfect sampler whose samples have classes c, with its deviation; {} where none is measured."""
    if not _is_judged_by_class(c, d):
        return {}
    return {CLASS_MMD: 0.0, f"{CLASS_MMD}_sd": class_mmd_deviation(c, real, width, d)}


def random_parts(c: Cond, count: int, generator: Generator) -> list[Tensor]:
    """The rows of c in disjoint random parts, of as many rows and as many of each class, give or take one."""
    order = torch.randperm(len(c), generator=generator)
    order = order[c[order].argsort(stable=True)]
    return [order[i::count] for i in range(count)]


def summarize(values: Sequence[float]) -> Scores:
    """Mean, unbiased sd and number of distances, as `mean`, `sd` and `splits`."""
    mean, sd = mean_sd(values)
    return {"mean": mean, "sd": sd, "splits": float(len(values))}
