"""Handwritten digits, by the features of the shipped classifier.

The protocol's own draws are keyed by its name: the same samples and data have the same score.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from dumo.data.source import Data
from dumo.features import digits
from dumo.io import digest
from dumo.metrics.frechet import frechet_distance
from dumo.metrics.mmd import kid
from dumo.metrics.moments import Moments
from dumo.metrics.neighbours import precision_recall
from dumo.protocols.evaluator import (
    Evaluator,
    Reference,
    Scores,
    Tick,
    WholeSetEvaluator,
    distances,
    fit,
    in_turn,
    named,
)
from dumo.random import stream
from dumo.types import Cond, Sample, Spec, UserError

SAMPLES = 2000  # samples
SUBSETS, SUBSET = 50, 500  # of the kernel distance
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)


class DigitsProtocol(Spec):
    """Samples of the 8x8 digits in [-1, 1], by the features of the shipped classifier."""

    kind: Literal["digits"] = "digits"
    samples: int = Field(default=SAMPLES, ge=SUBSET)

    @property
    def name(self) -> str:
        """`kind`, with the number of samples if it is not the standard one."""
        return named(self.kind, self.samples, SAMPLES)

    def check(self, shape: Sequence[int], classes: int = 10) -> None:
        """Refuse data that is not 8x8 digits of 10 classes with a `UserError`, before any work."""
        if tuple(shape) != (1, 8, 8) or classes != 10:
            raise UserError(
                "protocol digits judges samples of shape (1, 8, 8) in 10 classes,"
                f" not of shape {tuple(shape)} in {classes}: choose another protocol"
            )

    def labels(self, classes: int = 10) -> Int64[Tensor, " n"]:
        """The class of sample i: i mod `classes`."""
        return in_turn(self.samples, classes)

    def evaluator(
        self,
        open_data: Callable[[], Data],
        *,
        classes: int = 10,
        seed: int = 0,
        device: torch.device | str = "cpu",
        tick: Tick | None = None,
    ) -> Evaluator:
        """Who compares samples with all of the data. The features are so quick that device and tick are not used."""
        reference = Reference.of(open_data(), self.samples, seed)
        features = {
            "features": f"{digits.WIDTH} of dumo's classifier of digits",
            "features_sha256": digest.of_file(digits.WEIGHTS),
        }
        return WholeSetEvaluator(self, self.labels(classes), reference, features | reference.facts(seed))

    def score(self, x: Sample, c: Cond, reference: Reference) -> Scores:
        """`fd`, `fd_grey`, `kid` with `kid_sd`, `precision`, `recall`, and `accuracy`: the share read as c.

        All but one judge samples as the net makes them; `fd_grey` is `fd` after they are clamped to [-1, 1] and
        rounded to the 17 levels of the data, as an image file would hold them: the stricter of the two, for half of
        the pixels of a digit are at the end of the range, where clamped noise is no longer noise but a shift.
        Raises `UserError` if x is not `samples` finite images of 8x8.
        """
        self.check(reference.x.shape[1:])
        fit(self.name, self.samples, x, reference)
        fake, real = digits.features(x), digits.features(reference.x)
        grey = digits.features(_grey(x))
        mean, sd = kid(fake, real, subsets=SUBSETS, subset_size=SUBSET, generator=stream("digits", "kid"))
        precision, recall = precision_recall(real, fake, NEIGHBOURS)
        return {
            "fd": frechet_distance(Moments.of(fake), Moments.of(real)),
            "fd_grey": frechet_distance(Moments.of(grey), Moments.of(real)),
            "kid": mean,
            "kid_sd": sd,
            "precision": precision,
            "recall": recall,
            "accuracy": (digits.predict(x) == c.cpu()).double().mean().item(),
        }

    def baselines(self, reference: Reference) -> dict[str, Scores]:
        """The Fréchet distance where nothing is wrong, in halves and resamples of the data (`distances`)."""
        return distances(digits.features(reference.x), self.samples, "digits")


def _grey(x: Sample) -> Sample:
    """The nearest of the 17 grey levels 0..16 that the data has, as -1..1."""
    return ((x.clamp(-1, 1) + 1) * 8).round() / 8 - 1
