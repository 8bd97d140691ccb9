"""Properties of the metrics, one line each in `METRICS`, by the names of scores (`dumo.evaluation.protocol.Scores`).

`metric` looks up a score, `headline_score` selects the main one among several, and `is_trained_on` is true if a run
was trained on what the score measures. To add a metric, add a line here, its description in `dumo.config` (words.yaml),
and a protocol that computes it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The main score if both samples and data have classes.
CLASS_MMD = "class_mmd"
# The card's hash of the classes of the reference, if samples are compared by class.
CLASSES_SHA256 = "classes_sha256"
# The value of `trained_on` in a card if the loss compares samples themselves instead of features.
SAMPLE_SPACE = "numbers"


@dataclass(frozen=True)
class Metric:
    """The properties of a score. The defaults hold for scores that are not in `METRICS`.

    better: "equal" means equal to the score of a perfect sampler.
    in_sample_space: compares samples themselves instead of their features.
    in_summary: shown in summaries even if another score is the main one.
    can_reject: samples are reported as distinguishable if this score alone is two deviations worse than a perfect
        sampler's.
    needs_many_images: a perfect sampler's score cannot be estimated from few images.
    sd_is_spread: NAME_sd is the spread over subsets or splits of the samples, not a standard error, so scores are not
        ranked by it.
    """

    better: Literal["lower", "higher", "equal"] = "lower"
    in_sample_space: bool = False
    in_summary: bool = False
    can_reject: bool = False
    needs_many_images: bool = False
    sd_is_spread: bool = False


# In the order in which a report's verdict lists them.
METRICS: Mapping[str, Metric] = {
    # The AUC of a classifier between samples and data. Copies are closer to the data than new data are: below 0.5.
    "auc": Metric("equal", in_sample_space=True, can_reject=True),
    "auc_features": Metric("equal", can_reject=True),
    # Kernel distances within each class.
    CLASS_MMD: Metric(in_summary=True, can_reject=True),
    # The share of samples that a classifier assigns to their class.
    "accuracy": Metric("higher", can_reject=True),
    # The distance to the nearest training image, which is small for memorised images, and the share of copies.
    "nearest": Metric("higher", in_sample_space=True, in_summary=True, can_reject=True),
    "copies": Metric(in_sample_space=True, in_summary=True, can_reject=True),
    # Kernel and Fréchet distances.
    "mmd": Metric(needs_many_images=True),
    "mmd2": Metric(in_sample_space=True),
    "fd": Metric(needs_many_images=True),
    "fd_grey": Metric(needs_many_images=True),
    "pixel_fd": Metric(in_sample_space=True),
    # Scores with the features of Inception.
    "fid": Metric(needs_many_images=True),
    "sfid": Metric(),
    "kid": Metric(needs_many_images=True, sd_is_spread=True),
    "is": Metric("higher", sd_is_spread=True),
    # Scores from nearest neighbours. Noise also has a high precision, so summaries leave it out.
    "precision": Metric("higher"),
    "recall": Metric("higher", in_summary=True),
    # Bits per dimension: the negative log-likelihood.
    "bits": Metric(),
    # The similarity of images and captions.
    "clip_score": Metric("higher"),
}


def metric(score: str) -> Metric:
    """Return the properties of a score. An unknown score has the defaults: lower is better, in feature space."""
    return METRICS.get(score, Metric())


def higher_is_better(score: str) -> bool:
    """Whether higher is better. False also if the score should equal a perfect sampler's."""
    return metric(score).better == "higher"


def headline_score(scores: Collection[str], card: Mapping[str, Any] | None = None) -> str:
    """Return the main score: `class_mmd`, which alone depends on classes, else the first of `scores`.

    Scores that the run of this card was trained on are skipped, unless all are. `scores` must not be empty.
    """
    # Sorting is stable.
    ranked = sorted(scores, key=lambda score: score != CLASS_MMD)
    for score in ranked:
        if not is_trained_on(score, card or {}):
            return score
    return ranked[0]


def is_trained_on(score: str, card: Mapping[str, Any]) -> bool:
    """Whether the run of this card was trained on what a score measures, which makes the score biased.

    The card's `trained_on` is SAMPLE_SPACE if the loss compared samples, a feature name if it compared features, or "".
    A loss on samples affects scores in sample space; a loss on features affects scores with the same features, whose
    name occurs in the card's `features`.
    """
    loss_space = card.get("trained_on", "")
    if not loss_space:
        return False
    in_sample_space = metric(score).in_sample_space
    if loss_space == SAMPLE_SPACE:
        return in_sample_space
    return not in_sample_space and loss_space in card.get("features", "")
