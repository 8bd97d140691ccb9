"""Judging all samples at once: `whole_set` makes an evaluator that waits for them, and compares them with the data.

`collect` gathers samples by number from all ranks. `Reference` is the data to compare with, in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dumo.evaluation.baseline import class_facts
from dumo.evaluation.protocol import Context, NumberedSamples, Protocol, Scores
from dumo.evaluation.statistics import ordered
from dumo.io import digest
from dumo.io.source import Data, HeldOutSplit
from dumo.runtime import dist
from dumo.types import Cond, Sample, UserError

Real = Float[Tensor, "_ *_"]


@dataclass(frozen=True)
class Reference:
    """The data that samples are compared with."""

    x: Sample
    c: Cond
    redraw: Callable[[int], Sample] | None = None  # makes the i-th new draw of as many rows; None: `x` is all there is
    trained: Real | None = None  # what was trained on, where `x` was held out of it; None: `x` itself

    @classmethod
    def of(cls, data: Data, n: int, seed: int, trained: Data | None = None) -> "Reference":
        """All rows of a finite data set, or those that it holds out; n draws of a data set without end."""
        if isinstance(data, HeldOutSplit):
            return cls(data.held_out.x, data.held_out.c, trained=data.x)

        def redraw(i: int) -> Sample:
            x, _ = data.reference(n, seed, 1 + i)
            return x

        x, c = data.reference(n, seed)
        trained_x: Sample | None = None
        if trained is not None:
            trained_x, _ = trained.reference(n, seed)
        return cls(x, c, redraw=None if data.size else redraw, trained=trained_x)

    def facts(self, seed: int) -> dict[str, str]:
        """What a report says of the reference. Draws differ in their last bits between machines, so have no hash."""
        if self.redraw:
            return {"reference": f"{len(self.x):,} draws of seed {seed}"}
        which = "of the data" if self.trained is None else "held out, never trained on"
        return {"reference": f"{len(self.x):,} samples {which}", "reference_sha256": digest.of_tensor(self.x)}


@dataclass(frozen=True)
class _WholeSetEvaluator:
    """An evaluator that waits for all samples."""

    c: Int64[Tensor, " n"]  # of the samples
    reference: Reference
    facts: dict[str, str]
    measure: Callable[[Sample, Cond, Reference], Scores]
    measure_baselines: Callable[[Reference, int, Cond], dict[str, Scores]]  # takes the samples' number and classes

    def score(self, samples: NumberedSamples) -> Scores:
        """All samples by the measure. Raises UserError unless each came once, and is finite."""
        x = collect(samples, len(self.c))
        if not x.isfinite().all():
            raise UserError("some samples are not finite numbers: train again with a lower rate, or clip the gradient")
        return self.measure(x, self.c, self.reference)

    def baselines(self) -> dict[str, Scores]:
        """The scores of a perfect sampler and of noise, as the measure has them."""
        return self.measure_baselines(self.reference, len(self.c), self.c)


def whole_set(
    facts: Callable[[], dict[str, str]],
    measure: Callable[[Sample, Cond, Reference], Scores],
    measure_baselines: Callable[[Reference, int, Cond], dict[str, Scores]],
    *,
    by_class: bool = True,
) -> Callable[[Protocol, Context], _WholeSetEvaluator]:
    """The `open` of a measure that compares all samples with all of the data, or with as many draws of them.

    `facts` says what a report has of the features. `by_class`: the report also names classes that do not count.
    """

    def open_evaluator(protocol: Protocol, context: Context) -> _WholeSetEvaluator:
        trained = context.trained() if context.trained else None
        reference = Reference.of(context.data(), protocol.total, context.seed, trained)
        evaluator_facts = facts() | reference.facts(context.seed)
        c = protocol.classes_of(context)
        if by_class:
            evaluator_facts |= class_facts(c, reference.c)
        return _WholeSetEvaluator(c, reference, evaluator_facts, measure, measure_baselines)

    return open_evaluator


def collect(samples: NumberedSamples, total: int) -> Tensor:
    """All samples of all ranks, (total, *d), in the order of their numbers. Every rank must call it.

    Raises UserError unless each of the numbers 0 .. total - 1 came once.
    """
    indices: list[Tensor] = []
    batches: list[Tensor] = []
    for index, x in samples:
        indices.append(index.cpu())
        batches.append(x.cpu())
    if not batches:
        raise UserError("there are no samples to judge: give some, at least one batch to each rank")
    all_indices = torch.cat(dist.gathered(torch.cat(indices)))
    all_x = torch.cat(dist.gathered(torch.cat(batches)))
    return all_x[ordered(all_indices, total)]
