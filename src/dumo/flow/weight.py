"""Weights of the parts of a loss: a number, a line over the training, or a variance that is learned.

A variance exp(w) is learned beside the net, as its own part of the loss (Kendall et al. 2018; EDM2, Eq. 21):

    l / exp(w) + w        is least at        exp(w) = E[l],

so what is divided by it counts alike at all times. As w is told the time and not the sample, every time keeps its own
minimiser: targets are means, and stay so.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from dumo.types import PerSample, Spec

NUMBER, LINE = "number", "line"  # the choices, by tags of pydantic


class Line(Spec):
    """From `first` to `last` in the first share `over` of the training; then at rest. Ours."""

    kind: Literal["line"] = "line"
    first: float = Field(ge=0)
    last: float = Field(ge=0)
    over: float = Field(default=1.0, gt=0, le=1)

    def at(self, progress: float) -> float:
        """The weight when this share of the training is done, in [0, 1]."""
        done = min(1.0, progress / self.over)
        return (1 - done) * self.first + done * self.last


def _choice(given: object) -> str:
    """Which of the two a value is meant to be."""
    return LINE if isinstance(given, dict | Line) else NUMBER


Weight = Annotated[Annotated[float, Field(gt=0), Tag(NUMBER)] | Annotated[Line, Tag(LINE)], Discriminator(_choice)]


def weight_at(weight: float | Line, progress: float) -> float:
    """What a weight is when this share of the training is done, in [0, 1]."""
    return weight.at(progress) if isinstance(weight, Line) else weight


def by_variance(loss: PerSample, log_variance: PerSample | None) -> PerSample:
    """l / exp(w) + w; l where there is no w."""
    return loss if log_variance is None else (-log_variance).exp() * loss + log_variance
