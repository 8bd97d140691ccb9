"""Handwritten digits, by the features of the shipped classifier, and by two measures that no classifier of digits sees.

The first score, which counts, is of the samples as a file holds them. Where images were held out of training, samples
are judged against these alone as well. A Fréchet distance to few images is larger than to many: so it has a baseline
of its own, from as many images of the training set as there are samples to the same few.

The protocol's own draws are keyed by its name: the same samples and data have the same score.
"""

import torch
from torch import Tensor

from dumo.encoders.classifier import digits
from dumo.evaluation.distance import Moments, frechet_distance, kernel_distance, kid, pixel_frechet, two_sample_auc
from dumo.evaluation.neighbours import nearest, precision_recall
from dumo.evaluation.protocol import SPLITS, Measure, Reference, Scores, distances, summary, whole_set
from dumo.io.source import Split
from dumo.runtime.random import stream
from dumo.types import Cond, Sample

SUBSETS, SUBSET = 50, 500  # of the kernel distance
FEW = 5  # halves of the data between which the slower measures are taken
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)


def score(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`fd_grey`, `fd`, `kid` with `kid_sd`, `precision`, `recall`, `accuracy`, `auc` and `pixel_fd`.

    `fd_grey`, `auc` and `pixel_fd` judge samples as a file holds them: clamped to [-1, 1] and rounded to the 17
    levels of the data. The others judge them as the net makes them. `fd_grey` is the stricter of the two Fréchet
    distances: half of the pixels of a digit are at the end of the range, where clamped noise is no longer noise
    but a shift. `accuracy` is the share read as c; `auc` that of `two_sample_auc`, 0.5 where samples cannot be
    told from digits. Where images were held out, also what `_held` says.
    """
    filed = _grey(x)
    fake, grey, real = (digits.features(of) for of in (x, filed, reference.x))
    mean, sd = kid(fake, real, subsets=SUBSETS, subset_size=SUBSET, generator=stream("digits", "kid"))
    precision, recall = precision_recall(real, fake, NEIGHBOURS)
    scores = {
        "fd_grey": frechet_distance(Moments.of(grey), Moments.of(real)),
        "fd": frechet_distance(Moments.of(fake), Moments.of(real)),
        "kid": mean,
        "kid_sd": sd,
        "precision": precision,
        "recall": recall,
        "accuracy": (digits.predict(x) == c.cpu()).double().mean().item(),
        "auc": two_sample_auc(reference.x, filed, stream("digits", "auc")),
        "pixel_fd": pixel_frechet(filed, reference.x),
    }
    return scores | (_held(filed, fake, grey, reference.split) if reference.split else {})


def baselines(reference: Reference, samples: int) -> dict[str, Scores]:
    """The Fréchet distance of features between real digits, in halves and resamples of the data (`distances`).

    Digits are grey already, so it is that of `fd` and of `fd_grey`. `halves` has `auc` and `pixel_fd` too, of the
    first `FEW` of them, each with its sd. Where images were held out, `held` is the floor of `fd_grey_held`, and
    has `pixel_fd_held`: from `samples` rows of the training set, drawn with replacement, `SPLITS` times.
    """
    found, apart = distances(digits.features(reference.x), samples, "digits"), dict[str, list[float]]()
    for i in range(FEW):
        order = torch.randperm(len(reference.x), generator=stream("digits", "halves", i))
        a, b = reference.x[order].chunk(2)
        apart.setdefault("auc", []).append(two_sample_auc(a, b, stream("digits", "auc", i)))
        apart.setdefault("pixel_fd", []).append(pixel_frechet(a, b))
    for name, values in apart.items():
        of = summary(values)
        found["halves"] |= {name: of["mean"], f"{name}_sd": of["sd"]}
    if split := reference.split:
        known, real = digits.features(split.x), Moments.of(digits.features(split.held.x))
        draws = [stream("digits", "held", i) for i in range(SPLITS)]
        again = [torch.randint(split.size, (samples,), generator=g) for g in draws]
        of = summary([pixel_frechet(split.x[rows], split.held.x) for rows in again])
        found["held"] = summary([frechet_distance(Moments.of(known[rows]), real) for rows in again])
        found["held"] |= {"pixel_fd_held": of["mean"], "pixel_fd_held_sd": of["sd"]}
    return found


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


def facts() -> dict[str, str]:
    """The features, and the hash of their weights."""
    features = f"{digits.width} of dumo's classifier of digits"
    return {"features": features, "features_sha256": digits.sha256}


DIGITS = Measure(
    samples=2000,
    fewest=SUBSET,
    judges="samples of shape (1, 8, 8) in 10 classes",
    fits=lambda shape, classes: shape == (1, 8, 8) and classes == 10,
    open=whole_set(facts, score, baselines),
)
