"""The protocols `cifar10-features`, `digits` and `toy`, with bundled features.

`open_cifar10`, `open_digits` and `open_toy` make evaluators (`dumo.evaluation.wholeset`) for
`dumo.evaluation.bundled`. When all samples are collected, the protocol's `score_*` computes the scores. Its
`baselines_*` returns the scores of a perfect sampler and of noise.

| protocol         | features            | rounded to levels      | main score  | min samples   |
|------------------|---------------------|------------------------|-------------|---------------|
| cifar10-features | bundled classifier  | yes: 256 levels        | `class_mmd` | `MIN_CIFAR10` |
| digits           | bundled classifier  | most scores: 17 levels | `class_mmd` | `MIN_DIGITS`  |
| toy              | none: the points    | no                     | `mmd2`      | `MIN_POINTS`  |

Without classes, the main score is `mmd`. All three main scores are unbiased: the expected score of a perfect sampler is
0 for any number of samples and real images. Fréchet distances are biased, so scores are reported with the score of a
perfect sampler. No distance is an FID or comparable with published numbers.

Random draws are keyed by the protocol's name, so scores are deterministic.
"""

from functools import lru_cache
from hashlib import blake2b

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.encoders.classifier import IMAGES_AT_ONCE, ShippedClassifier, cifar10, digits
from dumo.evaluation.frechet import Moments, frechet_distance, pixel_frechet
from dumo.evaluation.mmd import (
    MIN_ROWS_PER_FEATURE,
    class_facts,
    gaussian_mmd,
    measure_null_distance,
    mmd2,
    mmd_scores,
    noise_class_mmd,
    null_spread,
    perfect_sampler_scores,
)
from dumo.evaluation.neighbours import nearest, nearest_other, precision_recall
from dumo.evaluation.protocol import Context, Evaluator, Protocol, Scores
from dumo.evaluation.small_sets import WIDTH as CIFAR10_WIDTH
from dumo.evaluation.stored import StoredFeatures
from dumo.evaluation.two_sample import auc_sd, two_sample_auc
from dumo.evaluation.wholeset import Reference, WholeSetEvaluator, choose_rows, make_opener
from dumo.io.picture import from_uint8, to_uint8
from dumo.runtime.random import noise, stream
from dumo.types import Cond, Sample, UserError

# The names of the protocols, which also key random draws.
CIFAR10_KIND = "cifar10-features"
DIGITS_KIND = "digits"
TOY_KIND = "toy"
# The kernel width: the median distance of two digits.
DIGITS_WIDTH = 8.0
# Kernel widths, in standard deviations of the data (our choice).
TOY_WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)
# The largest number of real images or points in kernel distances and in the unit of `nearest` (our choice).
MAX_REAL = 10_000
# The smallest number of samples, and of real images, of cifar10-features.
MIN_CIFAR10 = 1000
MIN_DIGITS = 500
CIFAR10_SHAPE = (3, 32, 32)
# The number of references whose features stay in memory.
MAX_CACHED = 2

Features = Float[Tensor, "_ f"]
# Images, points, or features of the data.
Real = Float[Tensor, "_ *_"]
Classes = Int64[Tensor, " _"]

# Features by a hash of the pixels: 26 MB for 50,000 images.
feature_cache: dict[bytes, Features] = {}


# ----------------------------------------------------------------------------------------------------- cifar10-features


def score_cifar10(x: Sample, c: Cond, reference: Reference) -> Scores:
    """Return the scores of samples x (n, 3, 32, 32) generated with classes c (n,).

    They are `mmd` and `class_mmd` with their standard errors, `fd`, `precision`, `recall`, `auc_features`, `nearest`,
    and `accuracy`, the share of samples that the classifier assigns to c. If all of c are equal, as without classes,
    `accuracy` and `class_mmd` are missing. Raises UserError if the reference has fewer than `MIN_CIFAR10` images.

    Images are clamped to [-1, 1] and rounded to 8 bits. `mmd` compares with at most `MAX_REAL` images of the reference.
    `precision`, `recall` and `auc_features` (`two_sample_auc` of features) compare with as many real images as samples,
    so that both sides cover space with equal density; 50,000 images would also take minutes. Only `auc_features`
    depends on the order of x, by which it splits x into halves.

    The classifier was trained on the 50,000 training images, with little overfitting. The `fd` to them was, for

        5,000 of them, drawn at random      0.34 +- 0.03
        5,000 unseen images, and 5,000 more 0.41, 0.34
        unseen with noise of sd 0.1         7.1
        unseen, blurred by 3x3              52
        noise                               279
    """
    fake = features_of(x)
    real = cached_features(reference.x)
    trained = None if reference.trained is None else cached_features(reference.trained)
    return {
        **_compare_features(fake, c, real, reference.c),
        "nearest": _nearness(fake, real, trained),
        **_accuracy(cifar10.classify(fake), c),
    }


def _score_stored(x: Sample, c: Cond, stored: StoredFeatures) -> Scores:
    """Return the scores of `score_cifar10` for stored features, without `nearest`, which needs the training images."""
    fake = features_of(x)
    return {**_compare_features(fake, c, stored.features, stored.c), **_accuracy(cifar10.classify(fake), c)}


def _compare_features(fake: Features, c: Cond, real: Real, real_c: Classes) -> Scores:
    """Return the scores of `score_cifar10` that compare features `fake` (n, f) with `real` (m, f)."""
    if len(real) < MIN_CIFAR10:
        raise UserError(f"protocol {CIFAR10_KIND} needs {MIN_CIFAR10} real images or more, got {len(real)}: add some")
    rows = _shuffled_rows(len(real))
    kernel_rows = rows[:MAX_REAL]
    as_many_real = real[rows[: len(fake)]]
    precision, recall = precision_recall(as_many_real, fake)
    return {
        **mmd_scores(fake, real[kernel_rows], width=CIFAR10_WIDTH, sample_c=c, real_c=real_c[kernel_rows]),
        "fd": frechet_distance(Moments.of(fake), Moments.of(real)),
        "precision": precision,
        "recall": recall,
        "auc_features": two_sample_auc(as_many_real, fake, stream(CIFAR10_KIND, "auc")),
    }


def baselines_cifar10(reference: Reference, sample_c: Cond) -> dict[str, Scores]:
    """Return the baselines `perfect` and `noise` of all scores except precision and recall.

    `sample_c` (n,) are the classes of the samples. `perfect` has the expected mean and sd for n new real images.
    """
    real = cached_features(reference.x)
    trained = None if reference.trained is None else cached_features(reference.trained)
    baselines = _baselines_of_features(real, reference.c.cpu(), sample_c)
    baselines["perfect"] |= _perfect_nearness(real, trained, len(sample_c))
    return baselines


def _baselines_of_stored(stored: StoredFeatures, sample_c: Cond) -> dict[str, Scores]:
    """Return the baselines of `baselines_cifar10` for stored features, without `nearest`."""
    return _baselines_of_features(stored.features, stored.c, sample_c)


def _baselines_of_features(real: Real, real_c: Classes, sample_c: Classes) -> dict[str, Scores]:
    """Return the baselines of `baselines_cifar10` without `nearest`, from the features `real` (m, f)."""
    num_samples = len(sample_c)
    # Sort the compared rows, since null deviations are computed from every k-th row.
    kernel_rows = _shuffled_rows(len(real))[:MAX_REAL].sort().values
    perfect = perfect_sampler_scores(
        CIFAR10_KIND,
        real,
        width=CIFAR10_WIDTH,
        sample_c=sample_c,
        real_c=real_c,
        kernel_rows=kernel_rows,
    )
    perfect |= _perfect_auc("auc_features", num_samples=num_samples, num_real=min(num_samples, len(real)))
    perfect |= _perfect_accuracy(cifar10.classify(real), real_c, num_samples)
    z = features_of(noise(0, range(MIN_CIFAR10), 0, CIFAR10_SHAPE))
    noise_scores = _noise_scores(
        z, real[kernel_rows], width=CIFAR10_WIDTH, sample_c=sample_c, real_c=real_c[kernel_rows]
    )
    return {"perfect": perfect, "noise": noise_scores}


def _shuffled_rows(num_real: int) -> Int64[Tensor, " m"]:
    """Return the rows of the reference in random order, so that the first rows contain all classes."""
    return torch.randperm(num_real, generator=stream(CIFAR10_KIND, "neighbours"))


def features_of(x: Sample) -> Features:
    """Compute the features (n, f) of images (n, 3, 32, 32) clamped and rounded to 8 bits."""
    return torch.cat([cifar10.features(from_uint8(to_uint8(part))) for part in x.split(IMAGES_AT_ONCE)])


def cached_features(x: Sample) -> Features:
    """Compute the features (m, f) of a reference (m, 3, 32, 32), cached in this process by its pixels."""
    pixels_hash = blake2b()
    for part in x.split(IMAGES_AT_ONCE):
        pixels_hash.update(to_uint8(part).cpu().contiguous().numpy().data)
    key = pixels_hash.digest()
    if key not in feature_cache:
        features = features_of(x)
        while len(feature_cache) >= MAX_CACHED:
            oldest = next(iter(feature_cache))
            del feature_cache[oldest]
        feature_cache[key] = features
    return feature_cache[key]


# --------------------------------------------------------------------------------------------------------------- digits


def score_digits(x: Sample, c: Cond, reference: Reference) -> Scores:
    """Return the scores of samples x (n, 1, 8, 8) generated with classes c (n,).

    They are `mmd` and `class_mmd` with their standard errors, `fd_grey`, `fd`, `precision`, `recall`, `auc`,
    `pixel_fd`, `nearest` and `accuracy`. `auc` is `two_sample_auc` of pixels, 0.5 if samples are indistinguishable from
    digits; `accuracy` is the share of samples that the classifier assigns to c. `auc`, `pixel_fd` and `nearest` compare
    pixels, all other scores features. If images were held out of training, they are the reference.

    `fd`, `precision`, `recall` and `accuracy` evaluate samples unchanged. All other scores evaluate samples clamped to
    [-1, 1] and rounded to the 17 levels of the data: half of the pixels of a digit are at the limits of the range,
    where clamped noise is a shift.
    """
    real = reference.x
    rounded = _round_to_grey_levels(x)
    fake_features = digits.features(x)
    rounded_features = digits.features(rounded)
    real_features = digits.features(real)
    precision, recall = precision_recall(real_features, fake_features)
    return {
        **mmd_scores(rounded_features, real_features, width=DIGITS_WIDTH, sample_c=c, real_c=reference.c),
        "fd_grey": frechet_distance(Moments.of(rounded_features), Moments.of(real_features)),
        "fd": frechet_distance(Moments.of(fake_features), Moments.of(real_features)),
        "precision": precision,
        "recall": recall,
        "auc": two_sample_auc(real, rounded, stream(DIGITS_KIND, "auc")),
        "pixel_fd": pixel_frechet(rounded, real),
        "nearest": _nearness(rounded, real, reference.trained),
        **_accuracy(digits.classify(fake_features), c),
    }


def baselines_digits(reference: Reference, sample_c: Cond) -> dict[str, Scores]:
    """Return the baselines `perfect` and `noise` of all scores except precision and recall.

    `sample_c` (n,) are the classes of the samples. `perfect` has the expected mean and sd for n new digits. `fd_grey`
    equals `fd`, since digits already have the data's grey levels.
    """
    num_samples = len(sample_c)
    x = reference.x
    real_c = reference.c.cpu()
    real = digits.features(x)
    perfect = perfect_sampler_scores(DIGITS_KIND, real, width=DIGITS_WIDTH, sample_c=sample_c, real_c=real_c)
    if "fd" in perfect:
        perfect["fd_grey"] = perfect["fd"]
        perfect["fd_grey_sd"] = perfect["fd_sd"]
    perfect |= _perfect_auc("auc", num_samples=num_samples, num_real=len(x))

    def pixel_distance(a: Tensor, b: Tensor) -> float:
        return pixel_frechet(x[a], x[b])

    min_part_rows = MIN_ROWS_PER_FEATURE * x[0].numel()
    null_pixels = measure_null_distance(real_c, pixel_distance, kind=DIGITS_KIND, min_part_rows=min_part_rows)
    if null_pixels:
        perfect["pixel_fd"], perfect["pixel_fd_sd"] = null_pixels.scaled_to(num_samples, len(x))
    perfect |= _perfect_accuracy(digits.classify(real), real_c, num_samples)
    perfect |= _perfect_nearness(x, reference.trained, num_samples)
    z = digits.features(_round_to_grey_levels(noise(0, range(MIN_DIGITS), 0, x.shape[1:])))
    noise_scores = _noise_scores(z, real, width=DIGITS_WIDTH, sample_c=sample_c, real_c=real_c)
    return {"perfect": perfect, "noise": noise_scores}


def _round_to_grey_levels(x: Sample) -> Sample:
    """Round pixels to the nearest of the data's 17 grey levels from -1 to 1."""
    return ((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1


# ------------------------------------------------------------------------------------------------------------------ toy


def score_toy(x: Sample, c: Cond, reference: Reference) -> Scores:
    """Return the unbiased MMD^2, `mmd2`, of points x (n, d), ignoring classes.

    The kernels are Gaussians with `TOY_WIDTHS` times the sd of the data. At most `MAX_REAL` points of a finite
    reference are used. Raises UserError if an infinite reference does not have n points.
    """
    real = reference.x.cpu()
    if reference.redraw is None:
        real = real[choose_rows(len(real), MAX_REAL, TOY_KIND)]
    elif len(real) != len(x):
        # The baseline compares equal numbers of points.
        raise UserError(f"protocol toy needs {len(x)} points of the data, got {len(real)}: draw equal numbers")
    return {"mmd2": mmd2(x.cpu(), real, _toy_widths(reference.x))}


def baselines_toy(reference: Reference, sample_c: Cond) -> dict[str, Scores]:
    """Return the baseline `null`: mean and sd of `mmd2` between two independent draws of n points of the data.

    Only the length n of `sample_c` is used. Other protocols call this baseline `perfect`. The result is {} if the data
    are finite.
    """
    if reference.redraw is None:
        return {}
    mean, sd = null_spread(reference.redraw, _toy_widths(reference.x), len(sample_c))
    return {"null": {"mean": mean, "sd": sd}}


def _toy_widths(x: Sample) -> list[float]:
    """Return `TOY_WIDTHS` times the sd of the data x (n, d), the root of the mean variance of its coordinates."""
    sd = x.double().var(0).mean().sqrt().item()
    return [width * sd for width in TOY_WIDTHS]


# -------------------------------------------------------------------------------- shared by cifar10-features and digits


def _noise_scores(z: Features, real: Real, *, width: float, sample_c: Classes, real_c: Classes) -> Scores:
    """Return `mmd` of noise with features z, as `mean` and `sd`, and its `class_mmd` if there are classes."""
    distance = gaussian_mmd(z, real, width)
    by_class = noise_class_mmd(z, real, width=width, sample_c=sample_c, real_c=real_c)
    return {"mean": distance.value, "sd": distance.error, **by_class}


def _perfect_auc(name: str, *, num_samples: int, num_real: int) -> Scores:
    """Return the AUC of a perfect sampler and its sd, as the score `name`."""
    return {name: 0.5, f"{name}_sd": auc_sd(num_samples, num_real)}


def _accuracy(predicted_c: Cond, c: Cond) -> Scores:
    """Return `accuracy`, the share of images whose predicted class is c; {} if all of c are equal."""
    if not (c != c[0]).any():
        return {}
    return {"accuracy": (predicted_c == c.cpu()).double().mean().item()}


def _perfect_accuracy(predicted_c: Cond, real_c: Cond, num_samples: int) -> Scores:
    """Return `accuracy` of real images, with its sd for `num_samples` new images; {} if all of `real_c` are equal."""
    scores = _accuracy(predicted_c, real_c)
    if "accuracy" in scores:
        num_real = len(real_c)
        # Laplace's estimate is never 1.
        p = (scores["accuracy"] * num_real + 1) / (num_real + 2)
        scores["accuracy_sd"] = (p * (1 - p) * (1 / num_samples + 1 / num_real)) ** 0.5
    return scores


def _nearness(fake: Real, real: Real, trained: Real | None) -> float:
    """Return the mean distance of samples to the nearest training image, relative to real images; 0 for copies.

    `trained` are the training images if `real` was held out. None means that `real` are the training images; a real
    image is then compared with all other ones.
    """
    training_images = real if trained is None else trained
    distances, _ = nearest(training_images, fake)
    return (distances.mean() / _real_distances(real, trained).mean()).item()


def _perfect_nearness(real: Real, trained: Real | None, num_samples: int) -> Scores:
    """Return the expected score `nearest` of `num_samples` new real images, which is 1, and its sd."""
    distances = _real_distances(real, trained)
    relative_sd = (distances.std() / distances.mean()).item()
    return {"nearest": 1.0, "nearest_sd": relative_sd * (1 / num_samples + 1 / len(distances)) ** 0.5}


@lru_cache(maxsize=MAX_CACHED)
def _real_distances(real: Real, trained: Real | None) -> Float64[Tensor, " n"]:
    """Return the distances of up to `MAX_REAL` real images to their nearest other training image.

    They are cached by tensor, since an evaluation needs them for each NFE.
    """
    step = -(-len(real) // MAX_REAL)
    measured_rows = torch.arange(len(real))[::step]
    if trained is None:
        return nearest_other(real, measured_rows)
    distances, _ = nearest(trained, real[measured_rows])
    return distances


# ------------------------------------------------------------------------- card entries, and functions that open these


def _classifier_facts(classifier: ShippedClassifier, data_name: str) -> dict[str, str]:
    return {"features": f"{classifier.width} of dumo's classifier of {data_name}", "features_sha256": classifier.sha256}


def _cifar10_facts() -> dict[str, str]:
    return _classifier_facts(cifar10, "CIFAR-10") | {
        "rounding": "0 to 255",
        "auc_features": "a support vector machine on the features, against as many images",
    }


def _digits_facts() -> dict[str, str]:
    return _classifier_facts(digits, "digits")


def _toy_facts() -> dict[str, str]:
    return {"features": f"none: Gaussian kernels on the points, of {TOY_WIDTHS} sd of the data"}


_open_cifar10_images = make_opener(_cifar10_facts, score_cifar10, baselines_cifar10)


def open_cifar10(protocol: Protocol, context: Context) -> Evaluator:
    """Return an evaluator that compares with images, or with their stored features if the context has them."""
    if context.stored is None:
        return _open_cifar10_images(protocol, context)
    stored = StoredFeatures.read(context.stored, cifar10.sha256)
    sample_c = protocol.classes_of(context)
    return WholeSetEvaluator(
        sample_c=sample_c,
        reference=stored,
        facts=_cifar10_facts() | stored.facts() | class_facts(sample_c, stored.c),
        measure=_score_stored,
        measure_baselines=_baselines_of_stored,
    )


open_digits = make_opener(_digits_facts, score_digits, baselines_digits)
open_toy = make_opener(_toy_facts, score_toy, baselines_toy, by_class=False)
