"""What every protocol has: a spec, whose name fixes how samples are judged, and an evaluator, which knows the data.

Samples are known by number and come in batches, of several ranks each rank's own share. Every rank must call an
evaluator, and all get the same score, whatever came in which batch or where. What a score depends on besides the
samples is in the evaluator's `facts`, of which a report is made, and by which two reports are known to be of one kind.

`Protocol` is the base of all specs, `Context` what an evaluator is made of, `Evaluator` what each evaluator must do.

The rest serves the protocols of this subpackage: `whole_set` and `collect` wait for all samples; `Reference` is the
data to compare with; `mmd`, `noise_by_class` and `class_facts` measure by class; `perfect`, `perfect_by_class` and
`distance_unit` say what a perfect sampler would have. `dumo.evaluation.metric` says what the name of a score means.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, runtime_checkable
from typing import Protocol as Interface

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Generator, Tensor

from dumo.evaluation.distance import (
    Moments,
    class_mmd,
    class_mmd_deviation,
    class_shares,
    frechet_distance,
    gaussian_mmd,
    mean_sd,
    mmd_deviation,
    shared_classes,
)
from dumo.evaluation.metric import CLASS_MMD, Scores
from dumo.evaluation.statistics import ordered
from dumo.io import digest
from dumo.io.source import Data, HeldOutSplit
from dumo.runtime import bound, dist
from dumo.runtime.random import stream
from dumo.types import Cond, Sample, Spec, UserError

NumberedSamples = Iterable[tuple[Tensor, Tensor]]  # numbers (n,) and samples (n, *d), in batches of any sizes
Real = Float[Tensor, "_ *_"]
Tick = Callable[[int, int], object]  # called with how many images of the data are done, of how many

MAX_PART_ROWS = 5000  # rows of a part between which distances are measured, where `least` allows: ours
PART_PAIRS = 60  # of parts: the spread is known to a tenth. Ours
LEAST = 2.5  # rows for each feature: Chong & Forsyth begin at 5,000 for 2,048


@runtime_checkable
class Evaluator(Interface):
    """Scores samples against data that it knows."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What it measures by, for a report's card: the features, the reference, and what else its protocol fixes."""
        ...

    def score(self, samples: NumberedSamples) -> Scores:
        """The scores by name. Every rank must call it.

        Raises UserError where samples are missing, come twice, or cannot be judged.
        """
        ...

    def baselines(self) -> dict[str, Scores]:
        """Scores to compare with, such as those of a perfect sampler, `perfect`; the first score as `mean` and `sd`."""
        ...


@dataclass(frozen=True)
class Context:
    """What an evaluator is made of: the data, how they are labelled, and where to compute."""

    data: Callable[[], Data]  # opens the data
    classes: int = 0  # of the data; 0: they have none
    seed: int = 0  # of draws of data without end
    device: torch.device | str = "cpu"
    tick: Tick | None = None
    captions: Callable[[], tuple[Data, Cond, Sequence[str]]] | None = None  # the data, captions of samples, all texts
    c: Cond | None = None  # the classes of samples that others made; None: those of the protocol
    trained: Callable[[], Data] | None = None  # opens what was trained on, where `data` was held out of it


class Protocol(Spec, ABC):
    """A named way to judge samples. `kind` fixes all that no other field changes; changes show in the name."""

    kind: Any  # a literal in each protocol; declared here to be the first field
    samples: int | None = Field(default=None, ge=2, le=bound.SAMPLES)  # None: as many as the name says

    @property
    @abstractmethod
    def standard_samples(self) -> int:
        """How many samples the name fixes."""

    @abstractmethod
    def unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Why samples of this decoded shape, in this number of classes, cannot be judged; "" where they can."""

    @abstractmethod
    def evaluator(self, context: Context) -> Evaluator:
        """An evaluator for these data. Raises `UserError` where the data, or files it needs, are missing or damaged."""

    @property
    def total(self) -> int:
        """How many samples are judged."""
        return self.samples or self.standard_samples

    @property
    def name(self) -> str:
        """`kind`, followed by what is not as it says (`odd`)."""
        return name_of(self.kind, *self.odd)

    @property
    def odd(self) -> list[str]:
        """What differs from what `kind` fixes, in words."""
        return [] if self.total == self.standard_samples else [f"{self.total} samples"]

    @property
    def missing(self) -> str | None:
        """What must be fetched or named before anything can be judged here; None: nothing."""
        return None

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Raise UserError where samples of this decoded shape, in this number of classes, cannot be judged."""
        problem = self.unfit(tuple(shape), classes)
        if problem:
            raise UserError(f"protocol {self.kind} {problem}")

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """The class of each sample, (total,): that of sample i is i mod `classes`, or 0 without classes."""
        return torch.arange(self.total) % max(classes, 1)

    def classes_of(self, context: Context) -> Cond:
        """The classes of the samples that are judged: those of the context, or, if it has none, the protocol's."""
        if context.c is not None:
            return context.c
        return self.labels(context.classes)


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
class Measure:
    """What the name of a protocol fixes whose features ship with the package."""

    samples: int  # how many are judged
    fewest: int  # samples that may be judged at least
    judges: str  # which samples, in words
    fits: Callable[[tuple[int, ...], int], bool]  # takes a decoded sample's shape and the number of classes
    open: Callable[[Protocol, Context], Evaluator]  # makes the evaluator


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


def name_of(kind: str, *odd: str) -> str:
    """The name of a protocol: its kind, and in brackets what is odd about it, for then it is another protocol."""
    return f"{kind} ({', '.join(odd)})" if odd else kind


class DistanceUnit(NamedTuple):
    """A distance of n rows to m others of one law, in units of 1/n + 1/m: what is no difference. Mean and spread."""

    mean: float
    sd: float

    def at(self, samples: int, reference: int, name: str = "", subsets: tuple[int, int] | None = None) -> Scores:
        """Those of a perfect sampler, which makes `samples` new real images, against `reference` of the data.

        As `mean` and `sd`, those of the first score, or, with the name of another, as NAME and NAME_sd. `subsets`: how
        many random subsets the score is the mean of, and their rows. Between two subsets the errors correlate as the
        rows do that they share, so that of the mean is between that of one and that of all.
        """
        of_all = 1 / samples + 1 / reference
        error = of_all
        if subsets:
            num_subsets, subset_rows = subsets
            of_one = 2 / subset_rows
            error = (of_all**2 + (of_one**2 - of_all**2) / num_subsets) ** 0.5
        if name:
            return {name: self.mean * of_all, f"{name}_sd": self.sd * error}
        return {"mean": self.mean * of_all, "sd": self.sd * error}


def distance_unit(
    c: Cond, distance: Callable[[Tensor, Tensor], float], kind: str, least: float, pairs: int = PART_PAIRS
) -> DistanceUnit | None:
    """The distance between disjoint parts of the data, whose classes are c, of two sizes: None of parts below `least`.

    `distance` takes the rows of both parts. The moments of n rows are off by a number times 1 / sqrt(n), and distances
    are squares: so FD = FD_inf + bias / n (Chong & Forsyth 2020, arXiv 1911.07023, Sec. 4), and between n and m rows of
    one law, where FD_inf is 0, it is 1/n + 1/m times a number whose law depends on neither (ours; measured on digits
    from 128 rows to 898). Samples come with the classes in turn, so each part has its share of each class: without,
    parts also differ in their counts of the classes, on digits more than in all else. Draws are keyed by `kind`.
    """
    few = max(2, int(len(c) // max(MAX_PART_ROWS, 2 * least)))  # parts; of the other size there are twice as many
    if len(c) // (2 * few) < least:
        return None
    rounds = -(-pairs // (few // 2 + few))
    values: list[float] = []
    for i in range(rounds):
        for count in (few, 2 * few):
            rows = random_parts(c, count, stream(kind, "parts", count, i))
            for a, b in zip(rows[::2], rows[1::2], strict=False):
                values.append(distance(a, b) / (1 / len(a) + 1 / len(b)))
    mean, sd = mean_sd(values)
    return DistanceUnit(mean, sd)


def mmd(
    fake: Float[Tensor, "b f"], real: Float[Tensor, "m f"], width: float, c: Cond, d: Int64[Tensor, " m"]
) -> Scores:
    """`mmd` and `class_mmd`, each with its standard error as NAME_sd, of rows of these classes.

    Without classes, and where no class has two images on both sides, there is no `class_mmd`.
    """
    if not _is_judged_by_class(c, d):
        pooled = gaussian_mmd(fake, real, width)
        return {"mmd": pooled.value, "mmd_sd": pooled.error}
    whole = gaussian_mmd(fake, real, width, c, d)
    by_class = class_mmd(fake, real, width, c, d)
    return {
        "mmd": whole.value,
        "mmd_sd": whole.error,
        CLASS_MMD: by_class.value,
        f"{CLASS_MMD}_sd": by_class.error,
    }


def _is_judged_by_class(c: Int64[Tensor, " n"], d: Int64[Tensor, " m"]) -> bool:
    """Whether samples of classes c and data of classes d have classes, and one of them two images on both sides."""
    return bool((c != c[0]).any()) and bool(shared_classes(c, d))


def class_facts(c: Int64[Tensor, " n"], d: Int64[Tensor, " m"]) -> dict[str, str]:
    """What a report says of the classes that `class_mmd` leaves out; nothing where it leaves out none."""
    if not (c != c[0]).any():
        return {}
    total = len(torch.cat([c.cpu(), d.cpu()]).unique())
    counted = len(shared_classes(c, d))
    if counted == total:
        return {}
    return {
        CLASS_MMD: f"{counted} of {total} classes: {total - counted} have fewer than 2 images on a side, and do not "
        "count"
    }


def noise_by_class(
    z: Float[Tensor, "b f"], real: Float[Tensor, "m f"], width: float, c: Int64[Tensor, " n"], d: Int64[Tensor, " m"]
) -> Scores:
    """`class_mmd` of noise z in place of the samples of each class; {} where samples are not judged by class."""
    if not _is_judged_by_class(c, d):
        return {}
    classes = shared_classes(c, d)
    distances = [gaussian_mmd(z, real[d == k], width).value for k in classes]
    return {CLASS_MMD: sum(p * x for p, x in zip(class_shares(d, classes), distances, strict=True))}


def perfect(
    kind: str,
    d: Cond,
    real: Float[Tensor, "m f"],
    samples: int,
    width: float,
    compared: int | None = None,
    c: Int64[Tensor, " n"] | None = None,
) -> Scores:
    """What a perfect sampler would have of `mmd`, as `mean` and `sd`, and of `fd` where there are rows enough to tell.

    `real` are the features of the data in classes d, of which the kernel distances take the first `compared`. With the
    classes c of the samples, `class_mmd` is among them, where samples are judged by class.
    """

    def distance(a: Tensor, b: Tensor) -> float:
        return frechet_distance(Moments.of(real[a]), Moments.of(real[b]))

    frechet_unit = distance_unit(d, distance, kind, LEAST * real.shape[1])
    some = real[:compared]
    some_d = d[:compared]
    scores = {"mean": 0.0, "sd": mmd_deviation(samples, some, width, some_d)}
    if c is not None:
        scores |= perfect_by_class(c, some, width, some_d)
    if frechet_unit:
        scores |= frechet_unit.at(samples, len(real), "fd")
    return scores


def perfect_by_class(
    c: Int64[Tensor, " n"], real: Float[Tensor, "m f"], width: float, d: Int64[Tensor, " m"]
) -> Scores:
    """`class_mmd` of a perfect sampler whose samples have classes c, with its deviation; {} where none is measured."""
    if not _is_judged_by_class(c, d):
        return {}
    return {CLASS_MMD: 0.0, f"{CLASS_MMD}_sd": class_mmd_deviation(c, real, width, d)}


def random_parts(c: Cond, count: int, generator: Generator) -> list[Tensor]:
    """The rows of c in disjoint random parts, of as many rows and as many of each class, give or take one."""
    order = torch.randperm(len(c), generator=generator)
    order = order[c[order].argsort(stable=True)]
    return [order[i::count] for i in range(count)]


def summarize(values: Sequence[float]) -> Scores:
    """Mean, unbiased sd and number of distances, as `mean`, `sd` and `splits`."""
    mean, sd = mean_sd(values)
    return {"mean": mean, "sd": sd, "splits": float(len(values))}
