"""The interface of every protocol, a named way to judge samples.

`Protocol` is the base of all specs: its `kind` fixes how samples are judged. In order, a caller

1. asks `check` whether samples of a shape can be judged, before any work;
2. hands what is known of the data to `evaluator`, as a `Context`, and gets an `Evaluator`;
3. calls the evaluator's `score` with samples, and `baselines` for scores to compare with.

Samples come in batches with their numbers, on several ranks each rank's own share. Every rank must call the evaluator,
and all get the same scores, however the samples were split over batches and ranks. All else that the scores depend on
is in the evaluator's `facts`, which a report prints; two reports with different facts are not compared.

`ModelProtocol` is the base of those that judge images by a model whose folder the user names.
`dumo.evaluation.metric` says what the name of a score means.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, runtime_checkable
from typing import Protocol as Interface  # `Protocol` is the specs' base here

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from dumo.encoders.part import TRANSFORMERS, choose_files
from dumo.io import hub
from dumo.io.data_source import Data
from dumo.runtime import limits
from dumo.types import HUB_MODEL, PLACE, Cond, Spec, UserError

MODEL_FIELD = "evaluate.protocol.model"

Scores = dict[str, float]  # by name. The first leads; lower is better, unless `metric.higher_is_better`
NumberedSamples = Iterable[tuple[Tensor, Tensor]]  # numbers (n,) and samples (n, *d), in batches of any sizes
ImageTick = Callable[[int, int], object]  # called with the number of images that are done, and of all images


@runtime_checkable
class Evaluator(Interface):
    """Scores samples against data that it knows."""

    @property
    def facts(self) -> Mapping[str, str]:
        """What scores depend on besides the samples, for a report's card: the features, the reference and others."""
        ...

    def score(self, samples: NumberedSamples) -> Scores:
        """The scores by name. Every rank must call it.

        Raises UserError where samples are missing, come twice, or cannot be judged.
        """
        ...

    def baselines(self) -> dict[str, Scores]:
        """Scores to compare with, by the name of the baseline: `perfect`, for one, has those of a perfect sampler.

        Each baseline has `mean` and `sd`: the leading score, and its standard deviation.
        """
        ...


@dataclass(frozen=True)
class Context:
    """What a protocol needs to make its evaluator: the data, their classes, and where to compute."""

    data: Callable[[], Data]  # opens the data
    classes: int = 0  # the number of classes of the data; 0: they have none
    seed: int = 0  # of draws from data without end
    device: torch.device | str = "cpu"
    tick: ImageTick | None = None  # is called while images of the data are read
    # opens the data, and gives the caption of each sample as an index (total,) into the texts, and all texts; None: the
    # data have no captions
    captions: Callable[[], tuple[Data, Cond, Sequence[str]]] | None = None
    c: Cond | None = None  # the class (total,) of each sample, where others made the samples; None: `Protocol.labels`
    trained: Callable[[], Data] | None = None  # opens what was trained on, where `data` was held out of it
    stored: Path | None = None  # a file of features of the data (`dumo.evaluation.stored`), read in place of the data
    split: str | None = None  # of the images, that `data` opens; None: that of the training


class Protocol(Spec, ABC):
    """A named way to judge samples. `kind` fixes all defaults, and fields that differ from them show in `name`."""

    kind: Any  # a literal in each protocol; declared here to be the first field
    samples: int | None = Field(default=None, ge=2, le=limits.SAMPLES)  # how many; None: `standard_samples`

    @property
    @abstractmethod
    def standard_samples(self) -> int:
        """How many samples the name fixes."""

    @abstractmethod
    def why_unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Why samples of this decoded shape, in this number of classes, cannot be judged; "" where they can.

        The text is a predicate, which `check` puts after "protocol NAME": "judges images, not samples of shape (2,)".
        """

    @abstractmethod
    def evaluator(self, context: Context) -> Evaluator:
        """An evaluator for these data. Raises `UserError` where the data, or files it needs, are missing or damaged."""

    @property
    def total(self) -> int:
        """How many samples are judged."""
        return self.samples or self.standard_samples

    @property
    def name(self) -> str:
        """`kind`, followed by the `deviations` from it in brackets."""
        return protocol_name(self.kind, *self.deviations)

    @property
    def deviations(self) -> list[str]:
        """What differs from what `kind` fixes, in words."""
        if self.total == self.standard_samples:
            return []
        return [f"{self.total} samples"]

    @property
    def missing(self) -> str | None:
        """Which file or field is missing, so that nothing can be judged here; None: nothing is."""
        return None

    @property
    def reads_data(self) -> bool:
        """Whether samples are compared with images of the data; else with a file."""
        return True

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Raise UserError if samples of this decoded shape, in this number of classes, cannot be judged."""
        problem = self.why_unfit(tuple(shape), classes)
        if problem:
            raise UserError(f"protocol {self.kind} {problem}")

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """The class of each sample, (total,): of sample i it is i mod `classes`, or 0 without classes."""
        return torch.arange(self.total) % max(classes, 1)

    def classes_of(self, context: Context) -> Cond:
        """The class (total,) of each sample that is judged: from the context, or, if it names none, `labels`."""
        if context.c is not None:
            return context.c
        return self.labels(context.classes)


class ModelProtocol(Protocol):
    """Judges images in colour or grey, decoded, by a model of transformers in safetensors."""

    model: str | None = Field(default=None, json_schema_extra=PLACE | HUB_MODEL)  # a folder, or a name on the Hub

    @property
    @abstractmethod
    def model_class(self) -> str:
        """The class of the model."""

    @property
    @abstractmethod
    def model_hint(self) -> str:
        """Where to get such a model."""

    @property
    def missing(self) -> str | None:
        """That no model is named; None: one is."""
        if self.model:
            return None
        return f"a {self.model_class}, in {MODEL_FIELD}: {self.model_hint}"

    def model_folder(self) -> Path:
        """The model's folder. Raises UserError where none is named."""
        if self.model is None:
            raise UserError(f"protocol {self.kind} needs {self.missing}")
        return hub.path_of(self.model, MODEL_FIELD, partial(choose_files, name=TRANSFORMERS))

    def why_unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Why samples of this shape are not judged: they must be images of 1 or 3 channels."""
        if len(shape) == 3 and shape[0] in (1, 3):
            return ""
        return f"judges images of 1 or 3 channels, not samples of shape {shape}: choose another protocol"


def name_of_data(split: str | None) -> str:
    """What samples are compared with, in words: "the data", or "split test"."""
    return "the data" if split is None else f"split {split}"


def protocol_name(kind: str, *deviations: str) -> str:
    """The name under which scores are reported. Deviations are part of it, because they make another protocol."""
    if not deviations:
        return kind
    return f"{kind} ({', '.join(deviations)})"
