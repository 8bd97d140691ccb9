"""The measures of three protocols that ship with the package: `cifar10-features`, `digits` and `toy`.

For each there are two functions, `score_...` of samples and `baselines_...` of a perfect sampler and of noise. The
entrances `open_cifar10`, `open_digits` and `open_toy`, which `dumo.evaluation.shipped` names, make an evaluator that
calls them once all samples have come (`dumo.evaluation.wholeset`). Others use `features_of`.

No number is an FID: distances are in features of dumo's own classifiers, comparable with each other and with no
published number. Each protocol's own draws are keyed by its name: the same samples and data have the same score.

`cifar10-features`: the reference is what the caller gives, as a rule the 50,000 training images. The classifier was
trained on these and has learned little by heart: to them, 5,000 real images that it has not seen are at a distance of
0.41, another 5,000 at 0.34, where as many drawn from the reference itself are at 0.34 +- 0.03; these 5,000 with noise
of sd 0.1 are at 7.1, blurred by 3x3 at 52, noise alone at 279 (measured). Images are judged as a file holds them,
clamped to [-1, 1] and rounded to 8 bits.

The first score, `mmd`, has no bias: a perfect sampler's is 0 at any size. It sees most (docs/evaluation.md).
Kernels are as wide as two real images are apart, at the median. A Fréchet distance to few images is larger than to
many, whatever is judged: so all scores stand next to what a perfect sampler would have.

`digits`: the measures `auc`, `pixel_fd` and `nearest` see no features. If images were held out of training, samples
are judged against these.

`toy`: points of a distribution that can be drawn from without end, by MMD^2 in the points' own space.
"""

from functools import lru_cache
from hashlib import blake2b

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.encoders.classifier import PIECE, cifar10, digits
from dumo.encoders.classifier import Shipped as Classifier
from dumo.evaluation.baseline import LEAST, distance_unit, mmd, noise_by_class, perfect
from dumo.evaluation.distance import (
    Moments,
    auc_sd,
    frechet_distance,
    gaussian_mmd,
    mmd2,
    null_spread,
    pixel_frechet,
    two_sample_auc,
)
from dumo.evaluation.neighbours import nearest, nearest_other, precision_recall
from dumo.evaluation.photos import WIDTH
from dumo.evaluation.protocol import Scores
from dumo.evaluation.shipped import MIN_CIFAR10, MIN_DIGITS
from dumo.evaluation.wholeset import Reference, make_opener
from dumo.io.picture import from_uint8, to_uint8
from dumo.runtime.random import noise, stream
from dumo.types import Cond, Sample, UserError

NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
WIDTH_DIGITS = 8.0  # of the kernel of digits: two of them are 8.0 apart, at the median
MAX_REAL = 10_000  # real images that kernels and neighbours take at most
KIND = "cifar10-features"
MAX_CACHED = 2  # references whose features are kept for this process
WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the kernels of toy, in sd of the data
Features = Float[Tensor, "_ f"]
Real = Float[Tensor, "_ *_"]
feature_cache: dict[bytes, Features] = {}  # by a hash of the pixels; 26 MB for 50,000 images


def score_cifar10(x: Sample, c: Cond, reference: Reference) -> Scores:
    """The scores of samples x (n, 3, 32, 32) that were asked for classes c (n,).

    They are `mmd` and `class_mmd` with their standard errors, `fd`, `precision`, `recall`, `auc_features`, `nearest`,
    and `accuracy`, the share that the classifier reads as c. Where all of c are equal, as without classes, there is no
    `accuracy`.

    `mmd` compares with `MAX_REAL` images of the reference. `precision`, `recall` and `auc_features`, which is
    `two_sample_auc` of the features, compare with as many images as there are samples, drawn by the protocol: so both
    sides cover space alike, and 50,000 images would take minutes. The order of x decides how `auc_features` halves it,
    and nothing else. The features of a reference are computed once in a process. Raises `UserError` if the reference
    has fewer than `MIN_CIFAR10` images.
    """
    fake = features_of(x)
    real = cached_features(reference.x)
    trained = None if reference.trained is None else cached_features(reference.trained)
    if len(real) < MIN_CIFAR10:
        raise UserError(f"protocol {KIND} compares with {MIN_CIFAR10} images or more, here are {len(real)}: add some")
    order = torch.randperm(len(real), generator=stream(KIND, "neighbours"))
    real_subset = real[order[: len(x)]]
    kernel_rows = order[:MAX_REAL]
    precision, recall = precision_recall(real_subset, fake, NEIGHBOURS)
    return {
        **mmd(fake, real[kernel_rows], WIDTH, c, reference.c[kernel_rows]),
        "fd": frechet_distance(Moments.of(fake), Moments.of(real)),
        "precision": precision,
        "recall": recall,
        "auc_features": two_sample_auc(real_subset, fake, stream(KIND, "auc")),
        "nearest": _nearness(fake, real, trained),
        **_accuracy(cifar10.classify(fake), c),
    }


def baselines_cifar10(reference: Reference, samples: int, sample_c: Cond | None = None) -> dict[str, Scores]:
    """What a perfect sampler, of new real images, would have of all scores but precision and recall, and of noise.

    `samples` is their number, `sample_c` (n,) their classes; None: classes with the shares of the reference. The
    baselines are called `perfect` and `noise`.
    """
    c = reference.c.cpu()
    real = cached_features(reference.x)
    trained = None if reference.trained is None else cached_features(reference.trained)
    if sample_c is None:
        sample_c = _classes_with_shares(c, samples)
    perfect_scores = perfect(KIND, c, real, samples, WIDTH, MAX_REAL, sample_c)
    perfect_scores |= _null_auc("auc_features", samples, min(samples, len(real)))
    perfect_scores |= _null_accuracy(cifar10.classify(real), c, samples)
    perfect_scores |= _null_nearness(real, trained, samples)
    z = features_of(noise(0, range(MIN_CIFAR10), 0, reference.x.shape[1:]))
    return {"perfect": perfect_scores, "noise": _noise_scores(z, real[:MAX_REAL], WIDTH, sample_c, c[:MAX_REAL])}


def _classes_with_shares(d: Int64[Tensor, " m"], samples: int) -> Int64[Tensor, " n"]:
    """Classes (`samples`,) in about the same shares as in d (m,)."""
    return d[torch.arange(samples) * len(d) // samples]


def _noise_scores(z: Features, real: Real, width: float, c: Int64[Tensor, " n"], d: Int64[Tensor, " _"]) -> Scores:
    """The scores of noise, by its features z: `mmd` as `mean` and `sd`, and `class_mmd` where classes are judged."""
    distance = gaussian_mmd(z, real, width)
    return {"mean": distance.value, "sd": distance.error, **noise_by_class(z, real, width, c, d)}


def _null_auc(name: str, samples: int, real: int) -> Scores:
    """The area `name` of a perfect sampler, and its deviation, by the numbers of samples and of real images."""
    return {name: 0.5, f"{name}_sd": auc_sd(samples, real)}


def _accuracy(predicted_c: Cond, c: Cond) -> Scores:
    """The share of images whose predicted class is c; {} where all of c are equal."""
    if not (c != c[0]).any():
        return {}
    return {"accuracy": (predicted_c == c.cpu()).double().mean().item()}


def _null_accuracy(predicted_c: Cond, c: Cond, samples: int) -> Scores:
    """The accuracy of real images, and the deviation of that of `samples` new ones; {} without classes."""
    scores = _accuracy(predicted_c, c)
    if "accuracy" in scores:
        p = (scores["accuracy"] * len(c) + 1) / (len(c) + 2)  # Laplace's estimate, which is never 1
        scores["accuracy_sd"] = (p * (1 - p) * (1 / samples + 1 / len(c))) ** 0.5
    return scores


def _nearness(fake: Real, real: Real, trained: Real | None) -> float:
    """The mean distance of samples to their nearest training image, over that of real images: copies have 0.

    `trained` are the training images, and `real` was held out; None: `real` was trained on, and the distance of a real
    image is that to its nearest other one.
    """
    distances, _ = nearest(real if trained is None else trained, fake)
    return (distances.mean() / _real_distances(real, trained).mean()).item()


def _null_nearness(real: Real, trained: Real | None, samples: int) -> Scores:
    """The score `nearest` of new real images, which is 1, and its deviation for this number of samples."""
    distances = _real_distances(real, trained)
    relative_sd = (distances.std() / distances.mean()).item()
    return {"nearest": 1.0, "nearest_sd": relative_sd * (1 / samples + 1 / len(distances)) ** 0.5}


@lru_cache(maxsize=MAX_CACHED)  # by tensor: an evaluation calls it once for each number of passes
def _real_distances(real: Real, trained: Real | None) -> Float64[Tensor, " n"]:
    """The distance of real images to their nearest training image other than themselves; of `MAX_REAL` at most."""
    step = -(-len(real) // MAX_REAL)
    measured_rows = torch.arange(len(real))[::step]
    if trained is None:
        return nearest_other(real, measured_rows)
    distances, _ = nearest(trained, real[measured_rows])
    return distances


def features_of(x: Sample) -> Features:
    """The features (n, f) of images (n, 3, 32, 32) after they are clamped and rounded to 8 bits."""
    return torch.cat([cifar10.features(from_uint8(to_uint8(part))) for part in x.split(PIECE)])


def cached_features(x: Sample) -> Features:
    """The features of a reference, as `features_of` has them, computed once for the same pixels."""
    pixels_hash = blake2b()
    for part in x.split(PIECE):
        pixels_hash.update(to_uint8(part).cpu().contiguous().numpy().data)
    key = pixels_hash.digest()
    if key not in feature_cache:
        features = features_of(x)
        while len(feature_cache) >= MAX_CACHED:
            oldest = next(iter(feature_cache))
            del feature_cache[oldest]
        feature_cache[key] = features
    return feature_cache[key]


def score_digits(x: Sample, c: Cond, reference: Reference) -> Scores:
    """The scores of samples x (n, 1, 8, 8) that were asked for classes c (n,).

    They are `mmd` and `class_mmd` with their standard errors, `fd_grey`, `fd`, `precision`, `recall`, `auc`,
    `pixel_fd`, `nearest` and `accuracy`. `auc` is `two_sample_auc` of pixels, 0.5 where samples cannot be distinguished
    from digits; `accuracy` is the share that the classifier reads as c.

    `fd`, `precision`, `recall` and `accuracy` judge samples as the net makes them. The others, the score that leads
    among them, judge them as a file holds them, clamped to [-1, 1] and rounded to the 17 levels of the data: half of
    the pixels of a digit are at the end of the range, where clamped noise is no longer noise but a shift.
    """
    real = reference.x
    rounded = _grey(x)
    fake_features = digits.features(x)
    rounded_features = digits.features(rounded)
    real_features = digits.features(real)
    precision, recall = precision_recall(real_features, fake_features, NEIGHBOURS)
    return {
        **mmd(rounded_features, real_features, WIDTH_DIGITS, c, reference.c),
        "fd_grey": frechet_distance(Moments.of(rounded_features), Moments.of(real_features)),
        "fd": frechet_distance(Moments.of(fake_features), Moments.of(real_features)),
        "precision": precision,
        "recall": recall,
        "auc": two_sample_auc(real, rounded, stream("digits", "auc")),
        "pixel_fd": pixel_frechet(rounded, real),
        "nearest": _nearness(rounded, real, reference.trained),
        **_accuracy(digits.classify(fake_features), c),
    }


def baselines_digits(reference: Reference, samples: int, sample_c: Cond | None = None) -> dict[str, Scores]:
    """What a perfect sampler, of new digits, would have of all scores but precision and recall, and of noise.

    `samples` is their number, `sample_c` (n,) their classes; None: classes with the shares of the reference. The
    baselines are called `perfect` and `noise`. Digits have the data's grey levels already, so `fd_grey` equals `fd`.
    """
    x = reference.x
    c = reference.c.cpu()
    real = digits.features(x)
    if sample_c is None:
        sample_c = _classes_with_shares(c, samples)

    def pixel_distance(a: Tensor, b: Tensor) -> float:
        return pixel_frechet(x[a], x[b])

    perfect_scores = perfect("digits", c, real, samples, WIDTH_DIGITS, c=sample_c)
    if "fd" in perfect_scores:
        perfect_scores["fd_grey"] = perfect_scores["fd"]
        perfect_scores["fd_grey_sd"] = perfect_scores["fd_sd"]
    perfect_scores |= _null_auc("auc", samples, len(x))
    pixel_unit = distance_unit(c, pixel_distance, "digits", LEAST * x[0].numel())
    if pixel_unit:
        perfect_scores |= pixel_unit.at(samples, len(x), "pixel_fd")
    perfect_scores |= _null_accuracy(digits.classify(real), c, samples)
    perfect_scores |= _null_nearness(x, reference.trained, samples)
    z = digits.features(_grey(noise(0, range(MIN_DIGITS), 0, x.shape[1:])))
    return {"perfect": perfect_scores, "noise": _noise_scores(z, real, WIDTH_DIGITS, sample_c, c)}


def _grey(x: Sample) -> Sample:
    """The samples with each pixel at the nearest of the 17 grey levels that the data has from -1 to 1."""
    return ((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1


def score_toy(x: Sample, c: Cond, reference: Reference) -> Scores:
    """The score `mmd2` of points x (n, d): unbiased, by Gaussian kernels of `WIDTHS` sd of the data; c is not read.

    Raises `UserError` if the reference does not have n points.
    """
    if len(reference.x) != len(x):  # the baseline is of as many points on both sides
        raise UserError(
            f"protocol toy compares {len(x)} points with as many, here are {len(reference.x)}: draw as many"
        )
    return {"mmd2": mmd2(x.cpu(), reference.x.cpu(), _widths(reference.x))}


def baselines_toy(reference: Reference, samples: int, sample_c: Cond | None = None) -> dict[str, Scores]:
    """The baseline `null`: mean and sd of `mmd2` between independent draws of the data; classes are not read.

    Raises `UserError` where the reference cannot be drawn anew.
    """
    if reference.redraw is None:
        raise UserError("protocol toy needs a data set that can be drawn anew: choose another protocol")
    mean, sd = null_spread(reference.redraw, _widths(reference.x), samples)
    return {"null": {"mean": mean, "sd": sd}}


def _widths(x: Sample) -> list[float]:
    """`WIDTHS` times the data's sd, the root of the mean variance of its coordinates."""
    sd = x.double().var(0).mean().sqrt().item()
    return [w * sd for w in WIDTHS]


def _facts_of(classifier: Classifier, data_name: str) -> dict[str, str]:
    """What a report says of a classifier that was trained on the data of this name."""
    return {"features": f"{classifier.width} of dumo's classifier of {data_name}", "features_sha256": classifier.sha256}


def _cifar10_facts() -> dict[str, str]:
    """What a report says of the features of cifar10-features."""
    return _facts_of(cifar10, "CIFAR-10") | {
        "rounding": "0 to 255",
        "auc_features": "a support vector machine on the features, against as many images",
    }


def _digits_facts() -> dict[str, str]:
    """What a report says of the features of digits."""
    return _facts_of(digits, "digits")


def _toy_facts() -> dict[str, str]:
    """What a report says of the features of toy."""
    return {"features": f"none: Gaussian kernels on the points, of {WIDTHS} sd of the data"}


open_cifar10 = make_opener(_cifar10_facts, score_cifar10, baselines_cifar10)
open_digits = make_opener(_digits_facts, score_digits, baselines_digits)
open_toy = make_opener(_toy_facts, score_toy, baselines_toy, by_class=False)
