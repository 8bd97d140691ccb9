"""The metrics: what is to be known of a score to read it, a line for each in `METRICS`.

A protocol returns scores by name (`dumo.evaluation.protocol.Scores`). `METRICS` has what else a name means: which way
is better, by what it is measured, and what it may decide. `metric` looks it up. `headline` is the score that counts,
`trained_on` whether a run learned from what a score is by, and `rising` whether more is better.

A new metric has a line here, its words in `dumo.config` (words.yaml), and a protocol that measures it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

CLASS_MMD = "class_mmd"  # leads where both sides have classes
NUMBERS = "numbers"  # what a card calls the numbers of samples themselves, where a loss compares by these


@dataclass(frozen=True)
class Metric:
    """What the name of a score means; the defaults are those of a name that is not in `METRICS`."""

    better: Literal["lower", "higher", "equal"] = "lower"  # equal: to a perfect sampler's
    by_numbers: bool = False  # of samples themselves; else by features
    in_summary: bool = False  # next to the score that leads
    tells_apart: bool = False  # over two deviations worse than a perfect sampler's: not like the data
    needs_many_images: bool = False  # of fewer nobody can say what a perfect sampler would have


# in the order in which a verdict names them
METRICS: Mapping[str, Metric] = {
    "auc": Metric("equal", by_numbers=True, tells_apart=True),  # below 0.5 are copies
    "auc_features": Metric("equal", tells_apart=True),
    CLASS_MMD: Metric(in_summary=True, tells_apart=True),
    "accuracy": Metric("higher", tells_apart=True),
    "nearest": Metric("higher", by_numbers=True, in_summary=True, tells_apart=True),  # memorised images are nearer
    "copies": Metric(by_numbers=True, in_summary=True, tells_apart=True),
    "mmd": Metric(needs_many_images=True),
    "mmd2": Metric(by_numbers=True),
    "fd": Metric(needs_many_images=True),
    "fd_grey": Metric(needs_many_images=True),
    "pixel_fd": Metric(by_numbers=True),
    "fid": Metric(needs_many_images=True),
    "sfid": Metric(),
    "kid": Metric(needs_many_images=True),
    "is": Metric("higher"),
    "precision": Metric("higher"),  # in no summary, for noise has a high one
    "recall": Metric("higher", in_summary=True),
    "bits": Metric(),
    "clip_score": Metric("higher"),
}


def metric(score: str) -> Metric:
    """What the name of a score means; of an unknown name the defaults: lower is better, by features."""
    return METRICS.get(score, Metric())


def rising(score: str) -> bool:
    """Whether more is better."""
    return metric(score).better == "higher"


def headline(scores: Collection[str], card: Mapping[str, Any] | None = None) -> str:
    """The score that counts: `class_mmd`, which alone sees classes, else the first.

    Of a run whose card says what it was trained on, the first of those that are by something else, if there is one.
    """
    ranked = sorted(scores, key=lambda score: score != CLASS_MMD)  # a stable order
    for score in ranked:
        if not trained_on(score, card or {}):
            return score
    return ranked[0]


def trained_on(score: str, card: Mapping[str, Any]) -> bool:
    """Whether a score is by what the run of this card was trained on: then it is no judge of it.

    Features go by a name that stands in what the card calls those of the protocol.
    """
    loss_features = card.get("trained_on", "")
    if not loss_features:
        return False
    is_by_numbers = metric(score).by_numbers
    if loss_features == NUMBERS:
        return is_by_numbers
    return not is_by_numbers and loss_features in card.get("features", "")
