"""Kernel distances of samples that have classes: `mmd` over all rows, and `class_mmd` within each class.

`mmd_scores` measures samples, `noise_class_mmd` noise in their place, and `perfect_mmd_scores` says what a perfect
sampler, which draws new real images, would have. `class_facts` tells a report which classes do not count.

Samples are judged by class if their classes differ and at least one class has two rows or more on both sides, because
the distance is a mean over pairs. Else there is no `class_mmd`. In every function `sample_c` are the classes of samples
or noise, `real_c` those of the data, and `width` is that of the Gaussian kernel.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dumo.evaluation.class_mmd import (
    class_mmd,
    class_mmd_null_sd,
    class_shares,
    gaussian_mmd,
    gaussian_mmd_null_sd,
    shared_classes,
)
from dumo.evaluation.metric import CLASS_MMD
from dumo.evaluation.protocol import Scores
from dumo.io import digest
from dumo.io.read import first_few

MAX_NAMED = 10  # classes that a report names: ours

SampleFeatures = Float[Tensor, "n f"]
RealFeatures = Float[Tensor, "m f"]
SampleClasses = Int64[Tensor, " n"]
RealClasses = Int64[Tensor, " m"]


def mmd_scores(
    fake: SampleFeatures, real: RealFeatures, *, width: float, sample_c: SampleClasses, real_c: RealClasses
) -> Scores:
    """The scores `mmd` and, where samples are judged by class, `class_mmd`.

    Each comes with its standard error, as `mmd_sd` and `class_mmd_sd`.
    """
    if not _is_judged_by_class(sample_c, real_c):
        without_classes = gaussian_mmd(fake, real, width)
        return {"mmd": without_classes.value, "mmd_sd": without_classes.error}
    over_all_rows = gaussian_mmd(fake, real, width, sample_c, real_c)
    within_classes = class_mmd(fake, real, width, sample_c, real_c)
    return {
        "mmd": over_all_rows.value,
        "mmd_sd": over_all_rows.error,
        CLASS_MMD: within_classes.value,
        f"{CLASS_MMD}_sd": within_classes.error,
    }


def noise_class_mmd(
    noise: Float[Tensor, "b f"], real: RealFeatures, *, width: float, sample_c: SampleClasses, real_c: RealClasses
) -> Scores:
    """`class_mmd` if all of the noise stood for the samples of each class; {} where samples are not judged by class."""
    if not _is_judged_by_class(sample_c, real_c):
        return {}
    classes = shared_classes(sample_c, real_c)
    distances = [gaussian_mmd(noise, real[real_c == k], width).value for k in classes]
    shares = class_shares(real_c, classes)
    return {CLASS_MMD: sum(share * distance for share, distance in zip(shares, distances, strict=True))}


def perfect_mmd_scores(real: RealFeatures, *, width: float, sample_c: SampleClasses, real_c: RealClasses) -> Scores:
    """The scores of `mmd_scores` expected from a perfect sampler, and their sd.

    As in any baseline of evaluation.json, `mmd` and its sd, which come first, are called `mean` and `sd`.
    """
    if not _is_judged_by_class(sample_c, real_c):
        sd = gaussian_mmd_null_sd(torch.zeros_like(sample_c), real, width, torch.zeros_like(real_c))
        return {"mean": 0.0, "sd": sd}
    return {
        "mean": 0.0,
        "sd": gaussian_mmd_null_sd(sample_c, real, width, real_c),
        CLASS_MMD: 0.0,
        f"{CLASS_MMD}_sd": class_mmd_null_sd(sample_c, real, width, real_c),
    }


def class_facts(sample_c: SampleClasses, real_c: RealClasses) -> dict[str, str]:
    """A report's fact about which classes `class_mmd` leaves out; {} where it leaves out none."""
    if not _has_classes(sample_c):
        return {}
    classes = {*sample_c.tolist(), *real_c.tolist()}
    shared = shared_classes(sample_c, real_c)
    left_out = sorted(classes - {*shared})
    if not left_out:
        return {}
    names = first_few(left_out, max_items=MAX_NAMED)
    if len(left_out) > MAX_NAMED:
        names += f" (hash {digest.short(*map(str, left_out))})"  # cards of other classes differ
    return {
        CLASS_MMD: f"over {len(shared)} of {len(classes)} classes, without {names}, which have fewer than 2 images on "
        "a side"
    }


def _is_judged_by_class(sample_c: SampleClasses, real_c: RealClasses) -> bool:
    return _has_classes(sample_c) and bool(shared_classes(sample_c, real_c))


def _has_classes(c: SampleClasses) -> bool:
    """Whether not all rows are of one class, as they are in data without classes."""
    return bool((c != c[0]).any())
