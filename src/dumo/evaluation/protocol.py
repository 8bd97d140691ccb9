"""What every protocol has: a spec, whose name fixes how samples are judged, and an evaluator, which knows the data.

Samples are known by number and come in batches, of several ranks each rank's own share. Every rank must call an
evaluator, and all get the same score, whatever came in which batch or where. What a score depends on besides the
samples is in the evaluator's `facts`, of which a report is made, and by which two reports are known to be of one kind.

`Protocol` is the base of all specs, `Context` what an evaluator is made of, `Evaluator` what each evaluator must do.
A spec is read with every run, so this file imports nothing that measures: that is in `dumo.evaluation.wholeset`, which
waits for all samples, and `dumo.evaluation.baseline`, which knows what a perfect sampler would have.
`dumo.evaluation.metric` says what the name of a score means.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from dumo.io.source import Data
from dumo.runtime import limits
from dumo.types import Cond, Spec, UserError

# Scores by name: the first is the one that counts, lower being better, but for one that is `metric.rising`
Scores = dict[str, float]
NumberedSamples = Iterable[tuple[Tensor, Tensor]]  # numbers (n,) and samples (n, *d), in batches of any sizes
Tick = Callable[[int, int], object]  # called with how many images of the data are done, of how many


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
    samples: int | None = Field(default=None, ge=2, le=limits.SAMPLES)  # None: as many as the name says

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


def name_of(kind: str, *odd: str) -> str:
    """The name of a protocol: its kind, and in brackets what is odd about it, for then it is another protocol."""
    return f"{kind} ({', '.join(odd)})" if odd else kind
