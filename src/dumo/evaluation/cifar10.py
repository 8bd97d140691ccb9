"""A named way to judge samples of CIFAR-10 without Inception: by the features of the shipped classifier.

The distances are in this classifier's features. They are comparable with each other, and with no published number:
they are no FID and are never called so. The reference is what the caller gives, as a rule the 50,000 training images.
The classifier was trained on these and has learned little by heart: to them, 5,000 real images that it has not seen
are at a distance of 0.41, another 5,000 at 0.34, where as many drawn from the reference itself are at 0.34 +- 0.03;
these 5,000 with noise of sd 0.1 are at 7.1, blurred by 3x3 at 52, noise alone at 279 (measured). Images are judged as
a file holds them, clamped to [-1, 1] and rounded to 8 bits.
"""

from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

from dumo.encoders.classifier import PIECE, cifar10
from dumo.evaluation.distance import Moments, frechet_distance, kid, two_sample_auc
from dumo.evaluation.neighbours import precision_recall
from dumo.evaluation.protocol import Measure, Reference, Scores, distances, whole_set
from dumo.io.picture import from_uint8, to_uint8
from dumo.runtime.random import stream
from dumo.types import Cond, Sample

KIND = "cifar10-features"
SUBSETS, SUBSET = 50, 1000  # of the kernel distance
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
KEPT = 2  # references whose features are kept

Features = Float[Tensor, "n f"]
known: dict[bytes, Features] = {}  # by the digest of the pixels, for this process; 26 MB for 50,000 images


def score(x: Sample, c: Cond, reference: Reference) -> Scores:
    """`fd`, `kid` with `kid_sd`, `precision`, `recall`, `auc_features`, and `accuracy`: the share read as c.

    Precision, recall and the area compare with as many images of the reference as there are samples, drawn by the
    protocol: so both sides cover space alike, and 50,000 of them would take minutes. The area is `two_sample_auc`
    of the features. Where all of c are equal, as without classes, there is no `accuracy`. The kernel's subsets and
    the area's halves depend on the order of x, nothing else does. The features of a reference are computed once in
    a process. Raises `UserError` if the reference is fewer than `SUBSET`.
    """
    fake, real = features_of(x), learned(reference.x)
    mean, sd = kid(fake, real, subsets=SUBSETS, subset_size=SUBSET, generator=stream(KIND, "kid"))
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


def baselines(reference: Reference, samples: int) -> dict[str, Scores]:
    """The Fréchet distance, real vs real, in halves and resamples of the data (`distances`)."""
    return distances(learned(reference.x), samples, KIND)


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


def facts() -> dict[str, str]:
    """The features, the hash of their weights, and what is done to images before."""
    return {
        "features": f"{cifar10.width} of dumo's classifier of CIFAR-10",
        "features_sha256": cifar10.sha256,
        "rounding": "0 to 255",
        "auc_features": "a support vector machine on the features, against as many images",
    }


CIFAR10 = Measure(
    samples=5000,
    fewest=SUBSET,  # a covariance of 128 features needs 129 rows, the kernel a subset
    judges="images of shape (3, 32, 32) in 10 classes or none",
    fits=lambda shape, classes: shape == (3, 32, 32) and classes in (0, 10),
    open=whole_set(facts, score, baselines),
)
