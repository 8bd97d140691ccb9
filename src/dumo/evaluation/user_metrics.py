"""Scores computed by functions of the user, in addition to a protocol's scores.

`UserMetricsEvaluator` wraps the protocol's evaluator. Its `score`

1. passes the samples to the protocol's evaluator, and keeps them;
2. calls each metric with all samples (n, *shape) in the order of their numbers, images clamped to [-1, 1];
3. adds the results to the protocol's scores under the metrics' names.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dumo.evaluation.protocol import Evaluator, NumberedSamples, Scores
from dumo.types import UserError

# Takes all samples, (n, *shape), images in [-1, 1].
UserMetric = Callable[[Tensor], float]
# Columns of a report that are not scores.
RESERVED_NAMES = ("nfe", "solver")


@dataclass(frozen=True)
class UserMetricsEvaluator:
    """An `Evaluator` that adds the scores of `metrics`, by name, to a protocol's. All samples are kept in memory."""

    protocol_evaluator: Evaluator
    metrics: Mapping[str, UserMetric]

    @property
    def facts(self) -> Mapping[str, str]:
        """The card entries of the protocol."""
        return self.protocol_evaluator.facts

    def score(self, samples: NumberedSamples) -> Scores:
        """Return the protocol's scores and the user's scores.

        Raises UserError if a metric has the name of another score or column, or returns a number that is not finite.
        """
        number_batches: list[Tensor] = []
        sample_batches: list[Tensor] = []

        # `samples` can only be iterated once.
        def keep_samples() -> Iterator[tuple[Tensor, Tensor]]:
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
                raise UserError(f"metrics: the report already has a column {name}: choose another name")
            number = float(metric(x))
            if not math.isfinite(number):
                raise UserError(f"metrics: {name} is {number}: return a finite number")
            scores[name] = number
        return scores

    def baselines(self) -> dict[str, Scores]:
        """Return the protocol's baselines. User metrics have none, since they are only called with samples."""
        return self.protocol_evaluator.baselines()
