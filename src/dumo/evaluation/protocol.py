"""What every protocol has: a spec, whose name fixes how samples are judged, and an evaluator, which knows the data.

Samples are known by number and come in batches, of several ranks each rank's own share. Every rank must call an
evaluator, and all get the same score, whatever came in which batch or where. What a score depends on besides the
samples is in the evaluator's `facts`, of which a report is made, and by which two reports are known to be of one kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from dumo.evaluation.distance import Moments, frechet_distance, mean_sd
from dumo.evaluation.statistics import ordered
from dumo.io import digest
from dumo.io.source import Data, Split
from dumo.runtime import bound, dist
from dumo.runtime.random import stream
from dumo.types import Cond, Sample, Spec, UserError

Made = Iterable[tuple[Tensor, Tensor]]  # numbers (n,) and samples (n, *d), in batches of any sizes
Tick = Callable[[int, int], object]  # called with how many images of the data have been seen, of how many
Scores = dict[str, float]  # the first is the one that counts, lower being better, but for those of RISING

OWN = ("auc", "copies", "mmd2", "nearest", "pixel_fd")  # by the numbers of samples themselves, no features
NUMBERS = "numbers"  # what a loss is trained on that compares by these
RISING = ("clip_score", "geneval", "dpg")
SPLITS = 20  # random halves, and bootstrap resamples


@runtime_checkable
class Evaluator(Interface):
    """Scores samples against data that it knows."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What it measures by: the features, the reference, and what else its protocol fixes."""
        ...

    def score(self, made: Made) -> Scores:
        """Each of the samples once. Raises UserError where some are missing, come twice, or cannot be judged."""
        ...

    def baselines(self) -> dict[str, Scores]:
        """The first of the scores, real vs real: its `mean` and `sd`, by what it is measured between."""
        ...


@dataclass(frozen=True)
class Context:
    """What an evaluator is made of: the data, which are opened when it is, and where and how to look at them."""

    data: Callable[[], Data]
    classes: int = 0
    seed: int = 0
    device: torch.device | str = "cpu"
    tick: Tick | None = None
    captions: Callable[[], tuple[Data, Cond, Sequence[str]]] | None = None  # data by captions, those of samples, texts


class Protocol(Spec, ABC):
    """A named way to judge samples. `kind` fixes all but what the other fields say, which shows in the name."""

    kind: Any  # a literal; here for its place, the first
    samples: int | None = Field(default=None, ge=2, le=bound.SAMPLES)  # None: as many as the name says

    @property
    @abstractmethod
    def standard_samples(self) -> int:
        """As many as the name says."""

    @abstractmethod
    def unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Why this cannot judge samples of a shape, that of a decoded one, in classes; "": it can."""

    @abstractmethod
    def evaluator(self, context: Context) -> Evaluator:
        """An evaluator of this data. Raises `UserError` where they, or what it needs, are missing or damaged."""

    @property
    def total(self) -> int:
        """How many samples are judged."""
        return self.samples or self.standard_samples

    @property
    def name(self) -> str:
        """`kind`, with what is odd."""
        return name_of(self.kind, *self.odd)

    @property
    def odd(self) -> list[str]:
        """Whatever is not as the name says."""
        return [] if self.total == self.standard_samples else [f"{self.total} samples"]

    @property
    def missing(self) -> str | None:
        """What must be fetched or named before anything can be judged here; None: nothing."""
        return None

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Refuse what this cannot judge with a `UserError`, before any work."""
        if why := self.unfit(tuple(shape), classes):
            raise UserError(f"protocol {self.kind} {why}")

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """The class of sample i: i mod `classes`, all 0 where there are none."""
        return torch.arange(self.total) % max(classes, 1)


@dataclass(frozen=True)
class Reference:
    """The data that samples are compared with."""

    x: Sample
    c: Cond
    redraw: Callable[[int], Sample] | None = None  # the i-th fresh draw of as many rows; None: `x` is all there is
    split: Split | None = None  # where some rows of `x` were held out of training

    @classmethod
    def of(cls, data: Data, n: int, seed: int) -> "Reference":
        """All of a finite data set, or n draws of one without end."""
        if isinstance(data, Split):
            return cls(data.whole.x, data.whole.c, split=data)
        redraw = None if data.size else lambda i: data.reference(n, seed, 1 + i)[0]
        return cls(*data.reference(n, seed), redraw=redraw)

    def facts(self, seed: int) -> dict[str, str]:
        """What a report says of it. Draws differ in their last bits between machines, so they have no hash."""
        if self.redraw:
            return {"reference": f"{len(self.x):,} draws of seed {seed}"}
        facts = {"reference": f"{len(self.x):,} samples of the data", "reference_sha256": digest.of_tensor(self.x)}
        if self.split:
            held = self.split.held.x
            facts |= {"held": f"{len(held):,} of them, never trained on", "held_sha256": digest.of_tensor(held)}
        return facts


@dataclass(frozen=True)
class Measure:
    """What a name fixes whose features ship with the package."""

    samples: int
    fewest: int  # samples
    judges: str  # in words
    fits: Callable[[tuple[int, ...], int], bool]  # of a decoded sample's shape and the number of classes
    open: Callable[[Protocol, Context], Evaluator]


@dataclass(frozen=True)
class WholeSet:
    """An evaluator that waits for all samples."""

    c: Int64[Tensor, " n"]
    reference: Reference
    facts: dict[str, str]
    measure: Callable[[Sample, Cond, Reference], Scores]
    real: Callable[[Reference, int], dict[str, Scores]]  # baselines, of a number of samples

    def score(self, made: Made) -> Scores:
        """All samples by the measure. Raises UserError unless each came once, and is finite."""
        x = collect(made, len(self.c))
        if not x.isfinite().all():
            raise UserError("some samples are not finite numbers: train again with a lower rate, or clip the gradient")
        return self.measure(x, self.c, self.reference)

    def baselines(self) -> dict[str, Scores]:
        """Those of the measure."""
        return self.real(self.reference, len(self.c))


def whole_set(
    facts: Callable[[], dict[str, str]],
    measure: Callable[[Sample, Cond, Reference], Scores],
    real: Callable[[Reference, int], dict[str, Scores]],
) -> Callable[[Protocol, Context], WholeSet]:
    """How a protocol opens that compares all samples with all of the data, or as many draws of them."""

    def open(protocol: Protocol, context: Context) -> WholeSet:
        reference = Reference.of(context.data(), protocol.total, context.seed)
        known = facts() | reference.facts(context.seed)
        return WholeSet(protocol.labels(context.classes), reference, known, measure, real)

    return open


def collect(made: Made, total: int) -> Tensor:
    """All samples of all ranks, in the order of their numbers. Raises UserError unless each came once."""
    mine = list(made)
    if not mine:
        raise UserError("there are no samples to judge: give some, at least one batch to each rank")
    index, x = (torch.cat([part[i].cpu() for part in mine]) for i in (0, 1))
    index, x = (torch.cat(dist.gathered(part)) for part in (index, x))
    return x[ordered(index, total)]


def headline(scores: Collection[str], card: Mapping[str, Any] | None = None) -> str:
    """The score that counts: that of what a file holds (`fd_grey`), where it was taken, else the first.

    Of a run whose card says what it was trained on, the first of those that are by something else, if there is one.
    """
    free = [score for score in scores if not trained_on(score, card or {})] or scores
    return "fd_grey" if "fd_grey" in free else next(iter(free))


def trained_on(score: str, card: Mapping[str, Any]) -> bool:
    """Whether a score is by what the run of this card was trained on: then it is no judge of it.

    Features go by a name that stands in what the card calls those of the protocol.
    """
    own, named = score.removesuffix("_held") in OWN, card.get("trained_on", "")
    return own if named == NUMBERS else bool(named) and not own and named in card.get("features", "")


def of_baseline(name: str, score: str) -> str:
    """The score that the mean and sd of a baseline are of: the one that counts, against images held out or all."""
    return f"{score}_held" if name == "held" else score


def rising(score: str) -> bool:
    """Whether more is better."""
    return score in RISING


def name_of(kind: str, *odd: str) -> str:
    """A protocol that is not as its name says is another one, and must not pass for it."""
    return f"{kind} ({', '.join(odd)})" if odd else kind


def distances(real: Float[Tensor, "n f"], samples: int, kind: str) -> dict[str, Scores]:
    """The Fréchet distance of features, real vs real: mean and sd over `SPLITS` draws, keyed by `kind`.

    `halves`: between random halves of the data. `bootstrap`: from `samples` of its rows, drawn with replacement, to
    the data: the floor of a score.
    """
    n, whole, halves, floors = len(real), Moments.of(real), list[float](), list[float]()
    for i in range(SPLITS):
        order = torch.randperm(n, generator=stream(kind, "halves", i))
        again = torch.randint(n, (samples,), generator=stream(kind, "bootstrap", i))
        halves.append(frechet_distance(Moments.of(real[order[: n // 2]]), Moments.of(real[order[n // 2 :]])))
        floors.append(frechet_distance(Moments.of(real[again]), whole))
    return {"halves": summary(halves), "bootstrap": summary(floors)}


def summary(values: Sequence[float]) -> Scores:
    """Mean, unbiased sd and number of some distances."""
    mean, sd = mean_sd(values)
    return {"mean": mean, "sd": sd, "splits": float(len(values))}
