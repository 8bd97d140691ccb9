"""What every protocol gives: an evaluator, which knows the data and scores samples.

Samples are known by number and come in batches, of several ranks each rank's own share. All ranks must ask, and all get
the same score, whatever came in which batch or where. What a score depends on beside the samples, the evaluator says:
`facts`, of which a report is made, and by which two reports are known to be of one kind.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dumo import dist
from dumo.data.source import Data, Split
from dumo.io import digest
from dumo.metrics.frechet import frechet_distance
from dumo.metrics.moments import Moments
from dumo.metrics.statistics import ordered
from dumo.random import stream
from dumo.types import Cond, Sample, UserError

Made = Iterable[tuple[Tensor, Tensor]]  # numbers (n,) and samples (n, *d), in batches of any sizes
Tick = Callable[[int, int], object]  # told how many images of the data have been seen, of how many
Scores = dict[str, float]  # the first is the one that counts, lower being better, but for those of RISING

OWN = ("auc", "copies", "mmd2", "nearest", "pixel_fd")  # by the numbers of samples themselves, no features
NUMBERS = "numbers"  # what a loss is trained on that compares by these
RISING = ("clip_score", "clip_s", "geneval", "dpg")
SPLITS = 20  # random halves, and bootstrap resamples


@runtime_checkable
class Evaluator(Protocol):
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
        told = {"reference": f"{len(self.x):,} samples of the data", "reference_sha256": digest.of_tensor(self.x)}
        if self.split:
            held = self.split.held.x
            told |= {"held": f"{len(held):,} of them, never trained on", "held_sha256": digest.of_tensor(held)}
        return told


@runtime_checkable
class Measure(Protocol):
    """Scores all samples at once, of classes c."""

    def score(self, x: Sample, c: Cond, reference: Reference) -> Scores:
        """As an evaluator's, of all samples."""
        ...

    def baselines(self, reference: Reference) -> dict[str, Scores]:
        """As an evaluator's."""
        ...


@dataclass(frozen=True)
class WholeSetEvaluator:
    """An evaluator that waits for all samples."""

    measure: Measure
    c: Int64[Tensor, " n"]
    reference: Reference
    facts: dict[str, str]

    def score(self, made: Made) -> Scores:
        """All samples by the measure."""
        return self.measure.score(collect(made, len(self.c)), self.c, self.reference)

    def baselines(self) -> dict[str, Scores]:
        """Those of the measure."""
        return self.measure.baselines(self.reference)


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
    """Whether a score is by what the run of this card was trained on (`Needs.trained_on`): then it is no judge of it.

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


def named(kind: str, samples: int, standard: int) -> str:
    """With a number of samples of one's own it is another protocol, and must not pass for the named one."""
    return kind if samples == standard else f"{kind} ({samples} samples)"


def fit(name: str, samples: int, x: Sample, reference: Reference) -> None:
    """Refuse samples that are not as many as a protocol judges, not like the data, or not finite. Raises UserError."""
    if x.shape[1:] != reference.x.shape[1:]:
        raise UserError(
            f"protocol {name} compares like with like: the samples have shape {tuple(x.shape[1:])}, the data"
            f" {tuple(reference.x.shape[1:])}: give the data that the net was trained on"
        )
    if len(x) != samples:
        raise UserError(f"protocol {name} judges {samples} samples, here are {len(x)}: give as many")
    if not x.isfinite().all():
        raise UserError("some samples are not finite numbers: train again with a lower rate, or clip the gradient")


def in_turn(samples: int, classes: int) -> Int64[Tensor, " n"]:
    """The class of sample i: i mod `classes`, all 0 where there are none."""
    return torch.arange(samples) % max(classes, 1)


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
    v = torch.tensor(values, dtype=torch.float64)
    return {"mean": v.mean().item(), "sd": v.std().item(), "splits": float(len(values))}
