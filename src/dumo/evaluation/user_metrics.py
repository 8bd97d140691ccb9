"""Scores by functions of the user's own, next to those of a run's protocol.

`OwnMetricsEvaluator` wraps the protocol's evaluator, and is an `Evaluator` itself. Its `score`

1. lets the protocol's evaluator judge the samples as they come, and keeps them;
2. calls each metric with all samples (n, *shape), in the order of their numbers, images clamped to [-1, 1];
3. adds each number that a metric returns to the protocol's scores, under the metric's name.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dumo.evaluation.protocol import Evaluator, NumberedSamples, Scores
from dumo.types import UserError

OwnMetric = Callable[[Tensor], float]  # takes all samples, (n, *shape), images in [-1, 1]
RESERVED_NAMES = ("nfe", "solver")  # what a row of a report has besides scores


@dataclass(frozen=True)
class OwnMetricsEvaluator:
    """An evaluator (`dumo.evaluation.protocol.Evaluator`) whose scores are followed by those of own metrics.

    All samples are kept in memory until they are judged.
    """

    protocol_evaluator: Evaluator
    metrics: Mapping[str, OwnMetric]  # by the name of the score

    @property
    def facts(self) -> Mapping[str, str]:
        """The facts of the protocol; own metrics add none."""
        return self.protocol_evaluator.facts

    def score(self, samples: NumberedSamples) -> Scores:
        """The protocol's scores, then those of own metrics.

        Raises UserError where a metric has the name of another score or column, or returns no finite number.
        """
        number_batches: list[Tensor] = []
        sample_batches: list[Tensor] = []

        def keep_samples() -> Iterator[tuple[Tensor, Tensor]]:  # they can be read once
            for numbers, batch in samples:
                number_batches.append(numbers)
                sample_batches.append(batch)
                yield numbers, batch

        scores = self.protocol_evaluator.score(keep_samples())
        order = torch.cat(number_batches).argsort()
        x = torch.cat(sample_batches)[order]
        is_image = x.ndim == 4
        if is_image:
            x = x.clamp(-1, 1)
        for name, metric in self.metrics.items():
            if name in scores or name in RESERVED_NAMES:
                raise UserError(f"metrics: {name} is a name that the report has already: take another")
            number = float(metric(x))
            if not math.isfinite(number):
                raise UserError(f"metrics: {name} is {number}, which is no finite number")
            scores[name] = number
        return scores

    def baselines(self) -> dict[str, Scores]:
        """The baselines of the protocol. Own metrics have none: they are called with the run's samples alone."""
        return self.protocol_evaluator.baselines()
