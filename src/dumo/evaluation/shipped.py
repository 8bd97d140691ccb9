"""Named ways to judge samples by features that ship with the package, or by none: nothing is fetched.

No number is an FID: distances are in features of dumo's own classifiers, comparable with each other and with no
published number. Each protocol's own draws are keyed by its name: the same samples and data have the same score.

`cifar10-features`: the reference is what the caller gives, as a rule the 50,000 training images. The classifier was
trained on these and has learned little by heart: to them, 5,000 real images that it has not seen are at a distance of
0.41, another 5,000 at 0.34, where as many drawn from the reference itself are at 0.34 +- 0.03; these 5,000 with noise
of sd 0.1 are at 7.1, blurred by 3x3 at 52, noise alone at 279 (measured). Images are judged as a file holds them,
clamped to [-1, 1] and rounded to 8 bits.

`digits`: two measures see no features. The first score, which counts, is of the samples as a file holds them. If images
were held out of training, samples are judged against these alone as well. A Fréchet distance to few images is larger
than to many, whatever is judged: so it stands next to what a perfect sampler would have (`of_perfect`).

`toy`: points of a law that can be drawn from without end, by MMD^2 in the points' own space.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import field_validator
from torch import Tensor

from dumo.encoders.classifier import PIECE, cifar10, digits
from dumo.encoders.classifier import Shipped as Classifier
from dumo.evaluation.distance import (
    Moments,
    auc_sd,
    frechet_distance,
    kernel_distance,
    kid,
    mmd2,
    null_spread,
    pixel_frechet,
    two_sample_auc,
)
from dumo.evaluation.neighbours import nearest, precision_recall
from dumo.evaluation.photos import PHOTOS
from dumo.evaluation.protocol import (
    LEAST,
    Context,
    Evaluator,
    Measure,
    Protocol,
    Reference,
    Scores,
    unit,
    whole_set,
)
from dumo.io.picture import from_uint8, to_uint8
from dumo.io.source import Split
from dumo.runtime.random import stream
from dumo.types import Cond, Sample, UserError

NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
SUBSETS, OF_CIFAR10, OF_DIGITS = 50, 1000, 500  # of the kernel distance: how many subsets, and their rows
KIND = "cifar10-features"
KEPT = 2  # references of which features are kept
WIDTHS = (0.05, 0.1, 0.2, 0.5, 1.0)  # of the kernels of toy, in sd of the data
Shipped = Literal["cifar10-features", "digits", "photos", "toy"]
Features = Float[Tensor, "n f"]
known: dict[bytes, Features] = {}  # by the digest of the pixels, for this process; 26 MB for 50,000 images


def score_cifar10(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`fd`, `kid` with `kid_sd`, `precision`, `recall`, `auc_features`, and `accuracy`: the share read as c.

    Precision, recall and the area compare with as many images of the reference as there are samples, drawn by the
    protocol: so both sides cover space alike, and 50,000 of them would take minutes. The area is `two_sample_auc`
    of the features. Where all of c are equal, as without classes, there is no `accuracy`. The kernel's subsets and
    the area's halves depend on the order of x, nothing else does. The features of a reference are computed once in
    a process. Raises `UserError` if the reference is fewer than `OF_CIFAR10`.
    """
    fake, real = features_of(x), learned(reference.x)
    mean, sd = kid(fake, real, subsets=SUBSETS, subset_size=OF_CIFAR10, generator=stream(KIND, "kid"))
    some = real[torch.randperm(len(real), generator=stream(KIND, "neighbours"))[: len(x)]]
    precision, recall = precision_recall(some, fake, NEIGHBOURS)
    score = {
        "fd": frechet_distance(Moments.of(fake), Moments.of(real)),
        "kid": mean,
        "kid_sd": sd,
        "precision": precision,
        "recall": recall,
        "auc_features": two_sample_auc(some, fake, stream(KIND, "auc")),
    }
    if (c != c[0]).any():
        score["accuracy"] = (cifar10.classify(fake) == c.cpu()).double().mean().item()
    return score


def baselines_cifar10(reference: Reference, samples: int) -> dict[str, Scores]:
    """`perfect` (`of_perfect`), of `fd`, `kid` and `auc_features`."""
    real, c, some = learned(reference.x), reference.c.cpu(), min(samples, len(reference.x))
    found = of_perfect(KIND, c, real, samples, {"": len(real)}, OF_CIFAR10)
    return {"perfect": found | null_auc("auc_features", samples, some)} if found else {}


def of_perfect(kind: str, c: Cond, real: Features, samples: int, sizes: Mapping[str, int], subset: int) -> Scores:
    """What a perfect sampler, of new real images, would have of both distances of features; {} of too few to tell.

    `sizes`: of references of these data, by what the names of scores against them end in; the first is of `mean`.
    `subset`: the rows of one, for the kernel distance of the first.
    """
    far = unit(c, lambda a, b: frechet_distance(Moments.of(real[a]), Moments.of(real[b])), kind, LEAST * real.shape[1])
    near = unit(c, lambda a, b: kernel_distance(real[a], real[b]), kind, 2.0)
    if not (far and near):
        return {}
    found = Scores()
    for end, size in sizes.items():
        found |= far.at(samples, size, end and f"fd_grey{end}")
        found |= near.at(samples, size, f"kid{end}", None if end else (SUBSETS, subset))
    return found


def null_auc(name: str, samples: int, real: int) -> Scores:
    """That of `two_sample_auc` where both sides are of one law."""
    return {name: 0.5, f"{name}_sd": auc_sd(samples, real)}


def features_of(x: Sample) -> Features:
    """The features of images after they are clamped and rounded to 8 bits, in pieces."""
    return torch.cat([cifar10.features(from_uint8(to_uint8(part))) for part in x.split(PIECE)])


def learned(x: Sample) -> Features:
    """As `features_of`, kept for the next time that the same images are the reference."""
    digest = blake2b()
    for part in x.split(PIECE):
        digest.update(to_uint8(part).cpu().contiguous().numpy().data)
    if (key := digest.digest()) not in known:
        f = features_of(x)
        while len(known) >= KEPT:
            del known[next(iter(known))]
        known[key] = f
    return known[key]


def score_digits(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`fd_grey`, `fd`, `kid` with `kid_sd`, `precision`, `recall`, `accuracy`, `auc` and `pixel_fd`.

    `fd_grey`, `auc` and `pixel_fd` judge samples as a file holds them: clamped to [-1, 1] and rounded to the 17
    levels of the data. The others judge them as the net makes them. `fd_grey` is the stricter of the two Fréchet
    distances: half of the pixels of a digit are at the end of the range, where clamped noise is no longer noise
    but a shift. `accuracy` is the share read as c; `auc` that of `two_sample_auc`, 0.5 where samples cannot be
    distinguished from digits. Where all of c are equal, as without classes, there is no `accuracy`. Where images were
    held out, also what `_held` says.
    """
    filed = _grey(x)
    fake, grey, real = (digits.features(of) for of in (x, filed, reference.x))
    mean, sd = kid(fake, real, subsets=SUBSETS, subset_size=OF_DIGITS, generator=stream("digits", "kid"))
    precision, recall = precision_recall(real, fake, NEIGHBOURS)
    scores = {
        "fd_grey": frechet_distance(Moments.of(grey), Moments.of(real)),
        "fd": frechet_distance(Moments.of(fake), Moments.of(real)),
        "kid": mean,
        "kid_sd": sd,
        "precision": precision,
        "recall": recall,
        **({"accuracy": (digits.predict(x) == c.cpu()).double().mean().item()} if (c != c[0]).any() else {}),
        "auc": two_sample_auc(reference.x, filed, stream("digits", "auc")),
        "pixel_fd": pixel_frechet(filed, reference.x),
    }
    return scores | (_held(filed, fake, grey, reference.split) if reference.split else {})


def baselines_digits(reference: Reference, samples: int) -> dict[str, Scores]:
    """`perfect` (`of_perfect`), with `auc` and `pixel_fd`; where images were held out, against these alone as well.

    Digits are grey already, so its `mean` is that of `fd_grey` and of `fd`.
    """
    x, c = reference.x, reference.c.cpu()
    sizes = {"": len(x)} | ({"_held": len(reference.split.held.x)} if reference.split else {})
    found = of_perfect("digits", c, digits.features(x), samples, sizes, OF_DIGITS)
    pixels = unit(c, lambda a, b: pixel_frechet(x[a], x[b]), "digits", LEAST * x[0].numel())
    if not (found and pixels):
        return {}
    found |= {"fd": found["mean"], "fd_sd": found["sd"]}
    for end, size in sizes.items():
        found |= null_auc(f"auc{end}", samples, size) | pixels.at(samples, size, f"pixel_fd{end}")
    return {"perfect": found}


def _grey(x: Sample) -> Sample:
    """The nearest of the 17 grey levels 0..16 that the data has, as -1..1."""
    return ((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1


def _held(filed: Sample, fake: Tensor, grey: Tensor, split: Split) -> Scores:
    """`fd_grey`, `kid`, `recall`, `auc` and `pixel_fd` of the images held out alone, as `NAME_held`; and `nearest`.

    `kid_held` is of all rows at once. `nearest` is the mean distance of samples, as a file holds them, from the nearest
    image that was trained on, over that of the images held out: about 1 of new digits, 0 of copies. `fake` and `grey`
    are the features of samples as the net makes them, and as a file holds them.
    """
    real = split.held.x
    true = digits.features(real)
    away, usual = (nearest(split.x, of)[0].mean() for of in (filed, real))
    return {
        "fd_grey_held": frechet_distance(Moments.of(grey), Moments.of(true)),
        "kid_held": kernel_distance(fake, true),
        "recall_held": precision_recall(true, fake, NEIGHBOURS)[1],
        "auc_held": two_sample_auc(real, filed, stream("digits", "auc")),
        "pixel_fd_held": pixel_frechet(filed, real),
        "nearest": (away / usual).item(),
    }


def score_toy(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`mmd2`, unbiased, of the mean of Gaussian kernels of `WIDTHS` sd of the data; c is not read.

    Raises `UserError` if the data are not as many.
    """
    if len(reference.x) != len(x):  # the null is of as many points on both sides
        raise UserError(
            f"protocol toy compares {len(x)} points with as many, here are {len(reference.x)}: draw as many"
        )
    return {"mmd2": mmd2(x.cpu(), reference.x.cpu(), _widths(reference.x))}


def baselines_toy(reference: Reference, samples: int) -> dict[str, Scores]:
    """`null`: mean and sd of `mmd2` between independent draws of the data. Raises `UserError` without `redraw`."""
    if reference.redraw is None:
        raise UserError("protocol toy needs a data set that can be drawn anew: choose another protocol")
    mean, sd = null_spread(reference.redraw, _widths(reference.x), samples)
    return {"null": {"mean": mean, "sd": sd}}


def _widths(x: Sample) -> list[float]:
    """`WIDTHS` times the data's sd, the root of the mean variance of its coordinates."""
    sd = x.double().var(0).mean().sqrt().item()
    return [w * sd for w in WIDTHS]


def facts_of(classifier: Classifier, of: str) -> dict[str, str]:
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
        fewest=OF_CIFAR10,  # a covariance of 128 features needs 129 rows, the kernel a subset
        judges="images of shape (3, 32, 32) in 10 classes or none",
        fits=lambda shape, classes: shape == (3, 32, 32) and classes in (0, 10),
        open=whole_set(lambda: facts_of(cifar10, "CIFAR-10") | FACTS_CIFAR10, score_cifar10, baselines_cifar10),
    ),
    "digits": Measure(
        samples=2000,
        fewest=OF_DIGITS,
        judges="samples of shape (1, 8, 8) in 10 classes or none",
        fits=lambda shape, classes: shape == (1, 8, 8) and classes in (0, 10),
        open=whole_set(lambda: facts_of(digits, "digits"), score_digits, baselines_digits),
    ),
    "photos": PHOTOS,
    "toy": Measure(
        samples=10_000,
        fewest=2,
        judges="vectors, of shape (d,), in any classes",
        fits=lambda shape, classes: len(shape) == 1,
        open=whole_set(lambda: FACTS_TOY, score_toy, baselines_toy),
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
