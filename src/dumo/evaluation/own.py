"""Scores by functions of the user's own, next to those of a run's protocol: `WithOwnMetrics` wraps its evaluator."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dumo.evaluation.protocol import Evaluator, NumberedSamples, Scores
from dumo.io.read import brief
from dumo.types import UserError

OwnMetric = Callable[[Tensor], float]  # of all samples, (n, *shape), images in [-1, 1]
RESERVED = ("nfe", "solver")  # what a row of a report has besides scores


@dataclass(frozen=True)
class WithOwnMetrics:
    """An evaluator whose scores are followed by those of own metrics. All samples lie in memory meanwhile."""

    evaluator: Evaluator
    metrics: Mapping[str, OwnMetric]  # by the name of the score

    @property
    def facts(self) -> Mapping[str, str]:
        """What the protocol measures by."""
        return self.evaluator.facts

    def score(self, samples: NumberedSamples) -> Scores:
        """The protocol's scores, then the own ones. Raises UserError for a name that is taken, or no number."""
        batches: list[tuple[Tensor, Tensor]] = []

        def remembered() -> Iterator[tuple[Tensor, Tensor]]:
            for numbers, x in samples:
                batches.append((numbers, x))
                yield numbers, x

        scores = self.evaluator.score(remembered())
        order = torch.cat([numbers for numbers, _ in batches]).argsort()
        x = torch.cat([x for _, x in batches])[order]
        if x.ndim == 4:
            x = x.clamp(-1, 1)
        for name, metric in self.metrics.items():
            if name in scores or name in RESERVED:
                raise UserError(f"metrics: {name} is a name that the report has already: take another")
            value = metric(x)
            try:
                scores[name] = float(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"metrics: {name} returned {brief(repr(value))}, which is no number") from error
            if not math.isfinite(scores[name]):
                raise UserError(f"metrics: {name} is {scores[name]}, which is no finite number")
        return scores

    def baselines(self) -> dict[str, Scores]:
        """Those of the protocol: what own metrics would be of other images is not known."""
        return self.evaluator.baselines()
