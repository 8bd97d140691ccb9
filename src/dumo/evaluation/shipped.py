"""Named ways to judge samples by features that ship with the package, or by none: nothing is fetched.

`ShippedProtocol` is the spec, `MEASURES` what each name fixes. For each there is a `score_...`, of samples, and a
`baselines_...`, of a perfect sampler and of noise, which `whole_set` calls once all samples are there. `photos` has a
file of its own.

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

`digits`: three measures see no features. If images were held out of training, samples are judged against these.

`toy`: points of a law that can be drawn from without end, by MMD^2 in the points' own space.
"""

from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int64
from pydantic import field_validator
from torch import Tensor

from dumo.encoders.classifier import PIECE, cifar10, digits
from dumo.encoders.classifier import Shipped as Classifier
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
from dumo.evaluation.metric import Scores
from dumo.evaluation.neighbours import nearest, nearest_other, precision_recall
from dumo.evaluation.photos import PHOTOS, WIDTH
from dumo.evaluation.protocol import (
    LEAST,
    Context,
    Evaluator,
    Measure,
    Protocol,
    Reference,
    distance_unit,
    mmd,
    noise_by_class,
    perfect,
    whole_set,
)
from dumo.io.picture import from_uint8, to_uint8
from dumo.runtime.random import noise, stream
from dumo.types import Cond, Sample, UserError

NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
MIN_CIFAR10 = 1000  # images
MIN_DIGITS = 500  # images
WIDTH_DIGITS = 8.0  # of the kernel: two digits are 8.0 apart, at the median
MAX_REAL = 10_000  # real images that kernels and neighbours take
KIND = "cifar10-features"
MAX_KNOWN = 2  # references of which features are kept
WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the kernels of toy, in sd of the data
Shipped = Literal["cifar10-features", "digits", "photos", "toy"]
Features = Float[Tensor, "_ f"]
Real = Float[Tensor, "_ *_"]
known: dict[bytes, Features] = {}  # by the digest of the pixels, for this process; 26 MB for 50,000 images


def score_cifar10(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`mmd`, `class_mmd`, `fd`, `precision`, `recall`, `auc_features`, `nearest`, and `accuracy`: the share read as c.

    The kernel distances have standard errors, `mmd_sd` and `class_mmd_sd`.

    Precision, recall and the area compare with as many images of the reference as there are samples, drawn by the
    protocol: so both sides cover space alike, and 50,000 of them would take minutes; `mmd` compares with `MAX_REAL`.
    The area is `two_sample_auc` of the features. Where all of c are equal, as without classes, there is no `accuracy`.
    The area's halves depend on the order of x, nothing else does. The features of a reference are computed once in a
    process. Raises `UserError` if the reference is fewer than `MIN_CIFAR10`.
    """
    fake = features_of(x)
    real = cached_features(reference.x)
    trained = None if reference.trained is None else cached_features(reference.trained)
    if len(real) < MIN_CIFAR10:
        raise UserError(f"protocol {KIND} compares with {MIN_CIFAR10} images or more, here are {len(real)}: add some")
    order = torch.randperm(len(real), generator=stream(KIND, "neighbours"))
    some = real[order[: len(x)]]
    many = order[:MAX_REAL]
    precision, recall = precision_recall(some, fake, NEIGHBOURS)
    return {
        **mmd(fake, real[many], WIDTH, c, reference.c[many]),
        "fd": frechet_distance(Moments.of(fake), Moments.of(real)),
        "precision": precision,
        "recall": recall,
        "auc_features": two_sample_auc(some, fake, stream(KIND, "auc")),
        "nearest": _nearness(fake, real, trained),
        **accuracy(cifar10.classify(fake), c),
    }


def baselines_cifar10(reference: Reference, samples: int, asked: Cond | None = None) -> dict[str, Scores]:
    """`perfect`: what a perfect sampler, of new real images, would have of all scores but precision and recall.

    `asked` are the classes of the samples; None: classes with the shares of the reference.
    """
    c = reference.c.cpu()
    real = cached_features(reference.x)
    trained = None if reference.trained is None else cached_features(reference.trained)
    if asked is None:
        asked = _classes_with_shares(c, samples)
    perfect_scores = perfect(KIND, c, real, samples, WIDTH, MAX_REAL, asked)
    perfect_scores |= _null_auc("auc_features", samples, min(samples, len(real)))
    perfect_scores |= _null_accuracy(cifar10.classify(real), c, samples)
    perfect_scores |= _null_nearness(real, trained, samples)
    z = features_of(noise(0, range(MIN_CIFAR10), 0, reference.x.shape[1:]))
    return {"perfect": perfect_scores, "noise": _noise_scores(z, real[:MAX_REAL], WIDTH, asked, c[:MAX_REAL])}


def _classes_with_shares(d: Int64[Tensor, " m"], samples: int) -> Int64[Tensor, " n"]:
    """Classes of a number of samples, with about the shares of d."""
    return d[torch.arange(samples) * len(d) // samples]


def _noise_scores(z: Features, real: Real, width: float, c: Int64[Tensor, " n"], d: Int64[Tensor, " _"]) -> Scores:
    """`mmd` of noise in place of samples, as `mean`, with its standard error, and `class_mmd` where that is judged."""
    distance = gaussian_mmd(z, real, width)
    return {"mean": distance.value, "sd": distance.error, **noise_by_class(z, real, width, c, d)}


def _null_auc(name: str, samples: int, real: int) -> Scores:
    """The area `name` and its deviation where samples and real images are of one law: what a perfect sampler has."""
    return {name: 0.5, f"{name}_sd": auc_sd(samples, real)}


def accuracy(read: Cond, c: Cond) -> Scores:
    """The share that is read as c; none where all of c are equal."""
    if not (c != c[0]).any():
        return {}
    return {"accuracy": (read == c.cpu()).double().mean().item()}


def _null_accuracy(read: Cond, c: Cond, samples: int) -> Scores:
    """The accuracy of real images, and the deviation of that of `samples` new ones; {} without classes."""
    scores = accuracy(read, c)
    if "accuracy" in scores:
        p = (scores["accuracy"] * len(c) + 1) / (len(c) + 2)  # Laplace's, which is never 1
        scores["accuracy_sd"] = (p * (1 - p) * (1 / samples + 1 / len(c))) ** 0.5
    return scores


def _nearness(fake: Real, real: Real, trained: Real | None) -> float:
    """The mean distance of samples from the nearest image that was trained on, over that of real images: copies have 0.

    Of images held out from the `trained`; where these are the reference itself, of each from the nearest other.
    """
    distances, _ = nearest(real if trained is None else trained, fake)
    return (distances.mean() / _real_distances(real, trained).mean()).item()


def _null_nearness(real: Real, trained: Real | None, samples: int) -> Scores:
    """`nearest` of new real images, which is 1, and its deviation for a number of `samples`."""
    distances = _real_distances(real, trained)
    relative_sd = (distances.std() / distances.mean()).item()
    return {"nearest": 1.0, "nearest_sd": relative_sd * (1 / samples + 1 / len(distances)) ** 0.5}


@lru_cache(maxsize=MAX_KNOWN)  # by tensor: one evaluation asks once for each number of passes
def _real_distances(real: Real, trained: Real | None) -> Float64[Tensor, " n"]:
    """How far real images are from the nearest that was trained on, other than themselves."""
    some = torch.arange(len(real))[:: -(-len(real) // MAX_REAL)]
    if trained is None:
        return nearest_other(real, some)
    distances, _ = nearest(trained, real[some])
    return distances


def features_of(x: Sample) -> Features:
    """The features of images after they are clamped and rounded to 8 bits, in pieces."""
    return torch.cat([cifar10.features(from_uint8(to_uint8(part))) for part in x.split(PIECE)])


def cached_features(x: Sample) -> Features:
    """As `features_of`, kept for the next time that the same images are the reference."""
    pixels_hash = blake2b()
    for part in x.split(PIECE):
        pixels_hash.update(to_uint8(part).cpu().contiguous().numpy().data)
    key = pixels_hash.digest()
    if key not in known:
        features = features_of(x)
        while len(known) >= MAX_KNOWN:
            oldest = next(iter(known))
            del known[oldest]
        known[key] = features
    return known[key]


def score_digits(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`mmd`, `class_mmd`, `fd_grey`, `fd`, `precision`, `recall`, `auc`, `pixel_fd`, `nearest` and `accuracy`.

    `fd`, precision, recall and accuracy judge samples as the net makes them. The others judge them as a file holds
    them: clamped to [-1, 1] and rounded to the 17 levels of the data. So does what counts, `mmd`: half of the pixels of
    a digit are at the end of the range, where clamped noise is no longer noise but a shift. `accuracy` is the share
    read as c; `auc` that of `two_sample_auc` of pixels, 0.5 where samples cannot be distinguished from digits.
    """
    real = reference.x
    filed = _grey(x)
    fake_features = digits.features(x)
    filed_features = digits.features(filed)
    real_features = digits.features(real)
    precision, recall = precision_recall(real_features, fake_features, NEIGHBOURS)
    return {
        **mmd(filed_features, real_features, WIDTH_DIGITS, c, reference.c),
        "fd_grey": frechet_distance(Moments.of(filed_features), Moments.of(real_features)),
        "fd": frechet_distance(Moments.of(fake_features), Moments.of(real_features)),
        "precision": precision,
        "recall": recall,
        "auc": two_sample_auc(real, filed, stream("digits", "auc")),
        "pixel_fd": pixel_frechet(filed, real),
        "nearest": _nearness(filed, real, reference.trained),
        **accuracy(digits.classify(fake_features), c),
    }


def baselines_digits(reference: Reference, samples: int, asked: Cond | None = None) -> dict[str, Scores]:
    """`perfect`: what a perfect sampler, of new digits, would have of all scores but precision and recall.

    `asked` are the classes of the samples; None: classes with the shares of the reference. Digits are grey already, so
    `fd_grey` and `fd` are one there.
    """
    x = reference.x
    c = reference.c.cpu()
    real = digits.features(x)
    if asked is None:
        asked = _classes_with_shares(c, samples)

    def pixel_distance(a: Tensor, b: Tensor) -> float:
        return pixel_frechet(x[a], x[b])

    perfect_scores = perfect("digits", c, real, samples, WIDTH_DIGITS, c=asked)
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
    return {"perfect": perfect_scores, "noise": _noise_scores(z, real, WIDTH_DIGITS, asked, c)}


def _grey(x: Sample) -> Sample:
    """The nearest of the 17 grey levels 0..16 that the data has, as -1..1."""
    return ((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1


def score_toy(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`mmd2`, unbiased, of the mean of Gaussian kernels of `WIDTHS` sd of the data; c is not read.

    Raises `UserError` if the data are not as many.
    """
    if len(reference.x) != len(x):  # the null is of as many points on both sides
        raise UserError(
            f"protocol toy compares {len(x)} points with as many, here are {len(reference.x)}: draw as many"
        )
    return {"mmd2": mmd2(x.cpu(), reference.x.cpu(), _widths(reference.x))}


def baselines_toy(reference: Reference, samples: int, asked: Cond | None = None) -> dict[str, Scores]:
    """`null`: mean and sd of `mmd2` between independent draws of the data; classes are not read.

    Raises `UserError` without `redraw`.
    """
    if reference.redraw is None:
        raise UserError("protocol toy needs a data set that can be drawn anew: choose another protocol")
    mean, sd = null_spread(reference.redraw, _widths(reference.x), samples)
    return {"null": {"mean": mean, "sd": sd}}


def _widths(x: Sample) -> list[float]:
    """`WIDTHS` times the data's sd, the root of the mean variance of its coordinates."""
    sd = x.double().var(0).mean().sqrt().item()
    return [w * sd for w in WIDTHS]


def _facts_of(classifier: Classifier, of: str) -> dict[str, str]:
    """The features of a classifier, and the hash of its weights."""
    return {"features": f"{classifier.width} of dumo's classifier of {of}", "features_sha256": classifier.sha256}


FACTS_CIFAR10 = {
    "rounding": "0 to 255",
    "auc_features": "a support vector machine on the features, against as many images",
}
FACTS_TOY = {"features": f"none: Gaussian kernels on the points, of {WIDTHS} sd of the data"}
MEASURES: dict[Shipped, Measure] = {
    "cifar10-features": Measure(
        samples=5000,
        fewest=MIN_CIFAR10,  # a covariance of 128 features needs 129 rows, the kernel a subset
        judges="images of shape (3, 32, 32) in 10 classes or none",
        fits=lambda shape, classes: shape == (3, 32, 32) and classes in (0, 10),
        open=whole_set(lambda: _facts_of(cifar10, "CIFAR-10") | FACTS_CIFAR10, score_cifar10, baselines_cifar10),
    ),
    "digits": Measure(
        samples=2000,
        fewest=MIN_DIGITS,
        judges="samples of shape (1, 8, 8) in 10 classes or none",
        fits=lambda shape, classes: shape == (1, 8, 8) and classes in (0, 10),
        open=whole_set(lambda: _facts_of(digits, "digits"), score_digits, baselines_digits),
    ),
    "photos": PHOTOS,
    "toy": Measure(
        samples=10_000,
        fewest=2,
        judges="vectors, of shape (d,), in any classes",
        fits=lambda shape, classes: len(shape) == 1,
        open=whole_set(lambda: FACTS_TOY, score_toy, baselines_toy, by_class=False),
    ),
}


class ShippedProtocol(Protocol):
    """Judges samples by features that ship with the package, or by none."""

    kind: Shipped

    @property
    def measure(self) -> Measure:
        """What the name fixes."""
        return MEASURES[self.kind]

    @property
    def standard_samples(self) -> int:
        """As many as the name says."""
        return self.measure.samples

    @field_validator("samples")
    @classmethod
    def _has_enough(cls, samples: int | None, known: Any) -> int | None:  # noqa: ANN401, pydantic's own, which beartype refuses
        kind: Shipped = known.data["kind"]
        if samples is not None and samples < MEASURES[kind].fewest:
            raise ValueError(f"protocol {kind} judges {MEASURES[kind].fewest} samples or more")
        return samples

    def unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Samples must be like the data that the measure knows."""
        if self.measure.fits(shape, classes):
            return ""
        return f"judges {self.measure.judges}, not samples of shape {shape} in {classes}: choose another protocol"

    def evaluator(self, context: Context) -> Evaluator:
        """An evaluator of this data. Raises `UserError` where they are too few."""
        return self.measure.open(self, context)
