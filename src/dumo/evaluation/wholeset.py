"""Judge all samples at once: protocols whose scores need the whole set, compared with the whole of the data.

`make_opener` is the entrance of `dumo.evaluation.measures`. It makes the function that opens such a protocol:

1. the opener reads the data to compare with (`Reference`) and makes an evaluator;
2. `score` waits for the samples of all ranks, puts them in the order of their numbers (`collect`), and hands them to a
   measure.

Protocols with another reference make a `WholeSetEvaluator` of it; those with evaluators of their own use `Reference`
and `collect` alone, and `choose_rows`, where they compare with a part of the data.
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

TrainedSamples = Float[Tensor, "_ *_"]  # of the shape of a reference's, but another number of them


@dataclass(frozen=True)
class Reference:
    """The data that samples are compared with, in memory."""

    x: Sample  # (m, *d)
    c: Cond  # (m,), their classes
    redraw: Callable[[int], Sample] | None = None  # makes the i-th new draw of m rows; None: the data are finite
    trained: TrainedSamples | None = None  # what was trained on, if `x` was held out of it; None: `x` itself was

    @classmethod
    def of(cls, data: Data, n: int, seed: int, trained: Data | None = None) -> "Reference":
        """The reference of a data set: all its rows, or n draws where it has no end.

        Of a `HeldOutSplit` it is the rows that are held out. The split itself holds the rows that were trained on, so
        `trained` is not read. For any other data `trained` says what was trained on, if that is not the data.
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
            new_x, _ = data.reference(n, seed, 1 + i)  # choice 0 is `x`
            return new_x

        return cls(x, c, redraw=redraw, trained=trained_x)

    def facts(self, seed: int, split: str | None) -> dict[str, str]:
        """What a report says of the reference, which is of this split of the data.

        Draws differ in their last bits between machines, so have no hash.
        """
        if self.redraw:
            return {"reference": f"{len(self.x):,} draws of seed {seed}"}
        which = f"of {name_of_data(split)}"
        if self.trained is not None:
            which = "held out" if split is None else which
            which += ", never trained on"
        return {"reference": f"{len(self.x):,} samples {which}", "reference_sha256": digest.of_tensor(self.x)}


R = TypeVar("R")  # what samples are compared with: a `Reference`, or features of one
# Takes samples, their classes, and the reference.
SampleMeasure = Callable[[Sample, Cond, R], Scores]
# Takes the reference, and the samples' classes, whose number is that of the samples.
BaselineMeasure = Callable[[R, Cond], dict[str, Scores]]


def make_opener(
    describe_features: Callable[[], dict[str, str]],
    measure: SampleMeasure[Reference],
    measure_baselines: BaselineMeasure[Reference],
    *,
    by_class: bool = True,
) -> "Callable[[Protocol, Context], WholeSetEvaluator[Reference]]":
    """Make the function that opens a protocol: it reads the reference, and returns an evaluator.

    `describe_features` gives a report's facts of the features. `by_class`: the facts also name the classes that do not
    count, because they have too few samples or data.
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
    """An evaluator (`dumo.evaluation.protocol.Evaluator`) that waits for all samples."""

    sample_c: Int64[Tensor, " n"]
    reference: R
    facts: dict[str, str]
    measure: SampleMeasure[R]
    measure_baselines: BaselineMeasure[R]

    def score(self, samples: NumberedSamples) -> Scores:
        """The scores of all samples. Every rank must call it.

        Raises UserError unless each sample came once and is finite.
        """
        x = collect(samples, len(self.sample_c))
        if not x.isfinite().all():
            raise NotFiniteError(
                "some samples are not finite numbers: train again with a lower rate, or clip the gradient"
            )
        return self.measure(x, self.sample_c, self.reference)

    def baselines(self) -> dict[str, Scores]:
        """The scores of a perfect sampler and of noise, as the measure has them."""
        return self.measure_baselines(self.reference, self.sample_c)


def choose_rows(num_rows: int, count: int, *key: int | str) -> Int64[Tensor, " _"]:
    """The numbers of `count` of `num_rows` rows, or of all where there are no more, in their order.

    They are chosen at random, keyed by `key`: in many sets the first rows, or every k-th, are of some classes only.
    """
    if num_rows <= count:
        return torch.arange(num_rows)
    return torch.randperm(num_rows, generator=stream(*key))[:count].sort().values


def collect(samples: NumberedSamples, total: int) -> Tensor:
    """All samples of all ranks, (total, *d), in the order of their numbers. Every rank must call it.

    Raises UserError, on every rank, where a rank has no batch, or unless each of the numbers 0 .. total - 1 came once.
    """
    indices: list[Tensor] = []
    batches: list[Tensor] = []
    for index, x in samples:
        indices.append(index.cpu())
        batches.append(x.cpu())
    batches_by_rank = torch.cat(dist.all_gather(torch.tensor([len(batches)])))
    if (batches_by_rank == 0).any():  # a rank that raised alone would leave the others waiting for it
        raise UserError("there are no samples to judge: give some, at least one batch to each rank")
    all_indices = torch.cat(dist.all_gather(torch.cat(indices)))
    all_x = torch.cat(dist.all_gather(torch.cat(batches)))
    return all_x[order_of(all_indices, total)]
