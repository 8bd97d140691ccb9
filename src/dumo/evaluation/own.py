"""Scores by functions of the user's own, next to those of a run's protocol.

`WithOwnMetrics` wraps the protocol's evaluator. Its `score` lets the evaluator judge the samples as they come, keeps
them, and then calls each metric with all samples in the order of their numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dumo.evaluation.protocol import Evaluator, NumberedSamples, Scores
from dumo.io.read import brief
from dumo.types import UserError

OwnMetric = Callable[[Tensor], float]  # takes all samples, (n, *shape), images in [-1, 1]
RESERVED_NAMES = ("nfe", "solver")  # what a row of a report has besides scores


@dataclass(frozen=True)
class WithOwnMetrics:
    """An evaluator (`dumo.evaluation.protocol.Evaluator`) whose scores are followed by those of own metrics.

    All samples are kept in memory until they are judged.
    """

    evaluator: Evaluator
    metrics: Mapping[str, OwnMetric]  # by the name of the score

    @property
    def facts(self) -> Mapping[str, str]:
        """The facts of the protocol; own metrics add none."""
        return self.evaluator.facts

    def score(self, samples: NumberedSamples) -> Scores:
        """The protocol's scores, then those of own metrics.

        Raises UserError where a metric has the name of another score or column, or returns no finite number.
        """
        all_numbers: list[Tensor] = []
        batches: list[Tensor] = []

        def keep_samples() -> Iterator[tuple[Tensor, Tensor]]:
            for numbers, batch in samples:
                all_numbers.append(numbers)
                batches.append(batch)
                yield numbers, batch

        scores = self.evaluator.score(keep_samples())
        order = torch.cat(all_numbers).argsort()
        x = torch.cat(batches)[order]
        if x.ndim == 4:  # images
            x = x.clamp(-1, 1)
        for name, metric in self.metrics.items():
            if name in scores or name in RESERVED_NAMES:
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
        """The baselines of the protocol. What own metrics would give for other images is not known."""
        return self.evaluator.baselines()
