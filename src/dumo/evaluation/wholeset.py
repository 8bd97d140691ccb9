"""Evaluators for scores of the whole set of samples, compared with the whole data set.

`make_opener` makes the function that opens such a protocol, for `dumo.evaluation.measures`. That function reads the
data (`Reference`) and returns a `WholeSetEvaluator`. Its `score` collects the samples of all ranks in the order of
their numbers (`collect`) before computing scores.

Other evaluators also use `Reference`, `collect`, and `choose_rows` to select a part of the data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dumo.error import NotFiniteError
from dumo.evaluation.mmd import class_facts
from dumo.evaluation.protocol import Context, NumberedSamples, Protocol, Scores, name_of_data
from dumo.evaluation.statistics import order_of
from dumo.io import digest
from dumo.io.data_source import Data, HeldOutSplit
from dumo.runtime import dist
from dumo.runtime.random import stream
from dumo.types import Cond, Sample, UserError

# The number of training samples can differ from the number of reference samples.
TrainedSamples = Float[Tensor, "_ *_"]


@dataclass(frozen=True)
class Reference:
    """The data that samples are compared with, in memory.

    x: (m, *d).
    c: (m,), the classes.
    redraw: draws m new rows, the i-th time. None means finite data.
    trained: the training data if `x` was held out. None means that `x` are the training data.
    """

    x: Sample
    c: Cond
    redraw: Callable[[int], Sample] | None = None
    trained: TrainedSamples | None = None

    @classmethod
    def of(cls, data: Data, n: int, seed: int, trained: Data | None = None) -> "Reference":
        """Return the reference of a data set: all rows of finite data, or n draws of infinite data.

        The reference of a `HeldOutSplit` are its held-out rows, and `trained` is ignored, since the split contains the
        training rows. For other data, `trained` is the training data if they differ from the data.
        """
        if isinstance(data, HeldOutSplit):
            return cls(data.held_out.x, data.held_out.c, trained=data.x)
        x, c = data.reference(n, seed)
        trained_x: Sample | None = None
        if trained is not None:
            trained_x, _ = trained.reference(n, seed)
        if data.size:
            return cls(x, c, trained=trained_x)

        def redraw(i: int) -> Sample:
            # Draw 0 is `x`.
            new_x, _ = data.reference(n, seed, 1 + i)
            return new_x

        return cls(x, c, redraw=redraw, trained=trained_x)

    def facts(self, seed: int, split: str | None) -> dict[str, str]:
        """Return the card entries of the reference, from this split of the data.

        Draws have no hash, since their last bits differ between machines.
        """
        if self.redraw:
            return {"reference": f"{len(self.x):,} draws of seed {seed}"}
        which = f"of {name_of_data(split)}"
        if self.trained is not None:
            which = "held out" if split is None else which
            which += ", never trained on"
        return {"reference": f"{len(self.x):,} samples {which}", "reference_sha256": digest.of_tensor(self.x)}


# A `Reference`, or features of one.
R = TypeVar("R")
# Takes samples, their classes, and the reference.
SampleMeasure = Callable[[Sample, Cond, R], Scores]
# Takes the reference, and the classes of all samples.
BaselineMeasure = Callable[[R, Cond], dict[str, Scores]]


def make_opener(
    describe_features: Callable[[], dict[str, str]],
    measure: SampleMeasure[Reference],
    measure_baselines: BaselineMeasure[Reference],
    *,
    by_class: bool = True,
) -> "Callable[[Protocol, Context], WholeSetEvaluator[Reference]]":
    """Make the function that opens a protocol: it reads the reference and returns an evaluator.

    describe_features: returns the card entries of the features.
    by_class: add a card entry with classes that are excluded, since they have too few samples or data.
    """

    def open_evaluator(protocol: Protocol, context: Context) -> WholeSetEvaluator[Reference]:
        trained = context.trained() if context.trained else None
        reference = Reference.of(context.data(), protocol.total, context.seed, trained)
        sample_c = protocol.classes_of(context)
        facts = describe_features() | reference.facts(context.seed, context.split)
        if by_class:
            facts |= class_facts(sample_c, reference.c)
        return WholeSetEvaluator(
            sample_c=sample_c,
            reference=reference,
            facts=facts,
            measure=measure,
            measure_baselines=measure_baselines,
        )

    return open_evaluator


@dataclass(frozen=True)
class WholeSetEvaluator(Generic[R]):
    """An `Evaluator` that computes scores of all samples together."""

    sample_c: Int64[Tensor, " n"]
    reference: R
    facts: dict[str, str]
    measure: SampleMeasure[R]
    measure_baselines: BaselineMeasure[R]

    def score(self, samples: NumberedSamples) -> Scores:
        """Return the scores of all samples. Every rank must call this.

        Raises UserError unless each sample occurs once and is finite.
        """
        x = collect(samples, len(self.sample_c))
        if not x.isfinite().all():
            raise NotFiniteError("some samples are not finite: lower the learning rate, or clip the gradient")
        return self.measure(x, self.sample_c, self.reference)

    def baselines(self) -> dict[str, Scores]:
        """Return the scores of a perfect sampler and of noise."""
        return self.measure_baselines(self.reference, self.sample_c)


def choose_rows(num_rows: int, count: int, *key: int | str) -> Int64[Tensor, " _"]:
    """Choose `count` of `num_rows` rows, or all if there are fewer; return their sorted numbers.

    The choice is random, keyed by `key`, since the first rows or every k-th row of many data sets have few classes.
    """
    if num_rows <= count:
        return torch.arange(num_rows)
    return torch.randperm(num_rows, generator=stream(*key))[:count].sort().values


def collect(samples: NumberedSamples, total: int) -> Tensor:
    """Gather the samples of all ranks, (total, *d), in the order of their numbers. Every rank must call this.

    Raises UserError, on every rank, if a rank has no batch or unless each number in 0 .. total - 1 occurs once.
    """
    indices: list[Tensor] = []
    batches: list[Tensor] = []
    for index, x in samples:
        indices.append(index.cpu())
        batches.append(x.cpu())
    batches_by_rank = torch.cat(dist.all_gather(torch.tensor([len(batches)])))
    # Raise on all ranks: if only one raised, the remaining ranks would wait for it.
    if (batches_by_rank == 0).any():
        raise UserError("a rank has no samples: give at least one batch to each rank")
    all_indices = torch.cat(dist.all_gather(torch.cat(indices)))
    all_x = torch.cat(dist.all_gather(torch.cat(batches)))
    return all_x[order_of(all_indices, total)]
