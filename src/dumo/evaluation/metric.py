"""The metrics: what must be known of a score to read it, a line for each in `METRICS`.

A protocol returns scores by name (`dumo.evaluation.protocol.Scores`). For such a name

- `metric` looks up which way is better, in which space samples are compared, and what the score may decide;
- `higher_is_better` is the most common question;
- `headline_score` chooses the score that counts among several;
- `is_trained_on` says whether a run learned from what the score measures.

A new metric has a line here, its description in `dumo.config` (words.yaml), and a protocol that measures it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

CLASS_MMD = "class_mmd"  # leads where both sides have classes
CLASSES_SHA256 = "classes_sha256"  # on a card: of the classes of the reference, where samples are judged by class
SAMPLE_SPACE = "numbers"  # `trained_on` on a card, where a loss compares the numbers of samples themselves


@dataclass(frozen=True)
class Metric:
    """What the name of a score means; the defaults are those of a name that is not in `METRICS`."""

    better: Literal["lower", "higher", "equal"] = "lower"  # equal: to a perfect sampler's
    in_sample_space: bool = False  # compares the numbers of samples themselves; False: their features
    in_summary: bool = False  # shown in a summary, also where another score leads
    # over two deviations worse than a perfect sampler's, this score alone says that samples are not like the data
    can_reject: bool = False
    needs_many_images: bool = False  # with few, nobody can say what a perfect sampler would have
    # NAME_sd is the spread over subsets or splits of the samples; it is no standard error, so nothing is ranked by it
    sd_is_spread: bool = False


# in the order in which a verdict names them
METRICS: Mapping[str, Metric] = {
    # a classifier of samples and data; below 0.5: samples are closer to the data than data are (copies)
    "auc": Metric("equal", in_sample_space=True, can_reject=True),
    "auc_features": Metric("equal", can_reject=True),
    # kernel distances within each class
    CLASS_MMD: Metric(in_summary=True, can_reject=True),
    # how often a classifier finds the class that was asked for
    "accuracy": Metric("higher", can_reject=True),
    # the distance to the nearest training image, which is small for memorised ones; the share that are copies
    "nearest": Metric("higher", in_sample_space=True, in_summary=True, can_reject=True),
    "copies": Metric(in_sample_space=True, in_summary=True, can_reject=True),
    # kernel and Frechet distances
    "mmd": Metric(needs_many_images=True),
    "mmd2": Metric(in_sample_space=True),
    "fd": Metric(needs_many_images=True),
    "fd_grey": Metric(needs_many_images=True),
    "pixel_fd": Metric(in_sample_space=True),
    # by Inception's features
    "fid": Metric(needs_many_images=True),
    "sfid": Metric(),
    "kid": Metric(needs_many_images=True, sd_is_spread=True),
    "is": Metric("higher", sd_is_spread=True),
    # by the neighbours of features
    "precision": Metric("higher"),  # in no summary, for noise has a high one
    "recall": Metric("higher", in_summary=True),
    # bits per dimension: the negative log-likelihood
    "bits": Metric(),
    # how well images fit their captions
    "clip_score": Metric("higher"),
}


def metric(score: str) -> Metric:
    """What the name of a score means; for an unknown name the defaults: lower is better, by features."""
    return METRICS.get(score, Metric())


def higher_is_better(score: str) -> bool:
    """Whether more is better; False also where the score should equal a perfect sampler's."""
    return metric(score).better == "higher"


def headline_score(scores: Collection[str], card: Mapping[str, Any] | None = None) -> str:
    """The score that counts: `class_mmd`, which alone depends on classes, else the first of `scores`.

    Scores that the run of this card was trained on are passed over, unless all are. `scores` has one at least.
    """
    ranked = sorted(scores, key=lambda score: score != CLASS_MMD)  # a stable order
    for score in ranked:
        if not is_trained_on(score, card or {}):
            return score
    return ranked[0]


def is_trained_on(score: str, card: Mapping[str, Any]) -> bool:
    """Whether a score measures what the run of this card was trained on, and so cannot judge it.

    A card has two texts. `trained_on` is what the loss compared: SAMPLE_SPACE, or, on cards of an older dumo, the name
    of features; "" for neither. `features` describes the features of the protocol, and has their name in it. A loss on
    samples concerns the scores in sample space, a loss on features those by the same features.
    """
    loss_space = card.get("trained_on", "")
    if not loss_space:
        return False
    in_sample_space = metric(score).in_sample_space
    if loss_space == SAMPLE_SPACE:
        return in_sample_space
    return not in_sample_space and loss_space in card.get("features", "")
