"""The interface of evaluation protocols.

`Protocol` is the base class of all specs. A caller

1. calls `check`, which raises UserError if samples of a shape cannot be evaluated;
2. passes the data, as a `Context`, to `evaluator`, which returns an `Evaluator`;
3. calls the evaluator's `score` with samples, and `baselines` for scores to compare with.

Samples are passed in numbered batches, on several ranks as each rank's share. Every rank must call the evaluator, and
all get the same scores, independent of the split over batches and ranks. Everything else that affects scores is in the
evaluator's `facts`, which become part of a report's card; reports with different facts are not compared.

`ModelProtocol` is the base class of protocols with a model chosen by the user. `dumo.evaluation.metric` has the
properties of scores.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, runtime_checkable
from typing import Protocol as Interface

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

# By name. The first is the main score. Lower is better, unless `metric.higher_is_better`.
Scores = dict[str, float]
# Batches of any size, with numbers (n,) and samples (n, *d).
NumberedSamples = Iterable[tuple[Tensor, Tensor]]
# Called with the number of images that are done, and of all images.
ImageTick = Callable[[int, int], object]


@runtime_checkable
class Evaluator(Interface):
    """Scores samples against data."""

    @property
    def facts(self) -> Mapping[str, str]:
        """Entries of a report's card on which scores depend, such as the features and the reference."""
        ...

    def score(self, samples: NumberedSamples) -> Scores:
        """Return the scores by name. Every rank must call this.

        Raises UserError if samples are missing, duplicated, or cannot be evaluated.
        """
        ...

    def baselines(self) -> dict[str, Scores]:
        """Return scores to compare with by the name of the baseline, such as `perfect` for a perfect sampler.

        Each baseline has `mean` and `sd`: the main score and its standard deviation.
        """
        ...


@dataclass(frozen=True)
class Context:
    """The data and settings from which a protocol makes its evaluator.

    data: opens the data.
    classes: the number of classes; 0 means data without classes.
    seed: keys draws from infinite data.
    tick: called while images of the data are read.
    captions: opens the data and returns them with the caption of each sample, an index (total,) into all texts, and the
        texts. None means data without captions.
    c: the class (total,) of each sample. None means `Protocol.labels`.
    trained: opens the training data if `data` was held out. None means that `data` are the training data.
    stored: a file with features of the data (`dumo.evaluation.stored`), which replaces the data.
    split: the split that `data` opens. None means the training split.
    """

    data: Callable[[], Data]
    classes: int = 0
    seed: int = 0
    device: torch.device | str = "cpu"
    tick: ImageTick | None = None
    captions: Callable[[], tuple[Data, Cond, Sequence[str]]] | None = None
    c: Cond | None = None
    trained: Callable[[], Data] | None = None
    stored: Path | None = None
    split: str | None = None


class Protocol(Spec, ABC):
    """The base class of protocols. `kind` fixes all defaults, and fields that deviate from them show in `name`."""

    # A literal in subclasses, declared here to be the first field.
    kind: Any
    # The number of samples. None means `standard_samples`.
    samples: int | None = Field(default=None, ge=2, le=limits.SAMPLES)

    @property
    @abstractmethod
    def standard_samples(self) -> int:
        """The number of samples fixed by the kind."""

    @abstractmethod
    def find_problem(self, shape: tuple[int, ...], classes: int) -> str:
        """Return the problem with samples of this decoded shape and number of classes; "" if there is none.

        `check` puts the text after "protocol KIND", for example "evaluates images, not samples of shape (2,)".
        """

    @abstractmethod
    def evaluator(self, context: Context) -> Evaluator:
        """Return an evaluator for these data. Raises UserError if data or required files are missing or damaged."""

    @property
    def total(self) -> int:
        """The number of samples."""
        return self.samples or self.standard_samples

    @property
    def name(self) -> str:
        """`kind`, followed by its `deviations` in brackets."""
        return protocol_name(self.kind, *self.deviations)

    @property
    def deviations(self) -> list[str]:
        """Descriptions of all settings that deviate from the kind."""
        if self.total == self.standard_samples:
            return []
        return [f"{self.total} samples"]

    @property
    def missing(self) -> str | None:
        """A missing file or field without which the protocol cannot run; None if there is none."""
        return None

    @property
    def reads_data(self) -> bool:
        """Whether samples are compared with the data instead of a reference file."""
        return True

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Raise UserError if samples of this decoded shape and number of classes cannot be evaluated."""
        problem = self.find_problem(tuple(shape), classes)
        if problem:
            raise UserError(f"protocol {self.kind} {problem}")

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """Return the class of each sample, (total,): i mod `classes` for sample i, or 0 without classes."""
        return torch.arange(self.total) % max(classes, 1)

    def classes_of(self, context: Context) -> Cond:
        """Return the class of each sample, (total,): `context.c`, or `labels` if it is None."""
        if context.c is not None:
            return context.c
        return self.labels(context.classes)


class ModelProtocol(Protocol):
    """The base class of protocols that evaluate decoded images with a transformers model in safetensors format."""

    # A folder or a Hub name.
    model: str | None = Field(default=None, json_schema_extra=PLACE | HUB_MODEL)

    @property
    @abstractmethod
    def model_class(self) -> str:
        """The class of the model."""

    @property
    @abstractmethod
    def model_hint(self) -> str:
        """How to get such a model."""

    @property
    def missing(self) -> str | None:
        """The required model if none is set, else None."""
        if self.model:
            return None
        return f"a {self.model_class}, in {MODEL_FIELD}: {self.model_hint}"

    def model_folder(self) -> Path:
        """Return the model's folder, downloading it if it is a Hub name. Raises UserError if no model is set."""
        if self.model is None:
            raise UserError(f"protocol {self.kind} needs {self.missing}")
        return hub.path_of(self.model, MODEL_FIELD, partial(choose_files, name=TRANSFORMERS))

    def find_problem(self, shape: tuple[int, ...], classes: int) -> str:
        """Refuse samples that are not images with 1 or 3 channels."""
        if len(shape) == 3 and shape[0] in (1, 3):
            return ""
        return f"evaluates images with 1 or 3 channels, not samples of shape {shape}: choose another protocol"


def name_of_data(split: str | None) -> str:
    """Return the name of the reference data in reports: "the data" or, for example, "split test"."""
    return "the data" if split is None else f"split {split}"


def protocol_name(kind: str, *deviations: str) -> str:
    """Return the name under which scores are reported, which includes all deviations from the kind."""
    if not deviations:
        return kind
    return f"{kind} ({', '.join(deviations)})"
