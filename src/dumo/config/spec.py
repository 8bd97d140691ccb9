"""`Run`: the configuration of a run, whose fields are the keys of run.yaml.

`Run` checks that its parts fit each other (`dumo.config.check_spec`) when it is validated. `Sampling` and `Evaluation`
say how samples are made and how a run is judged; the other parts come from the subpackages that use them.
`StandaloneParts` validates an objective or data that Python code gives without a run around them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, JsonValue, model_validator

from dumo.config.check_spec import check
from dumo.config.conditions import Conditions, shown_data
from dumo.config.teacher_spec import Start, Teacher
from dumo.data import Data, ShownData
from dumo.encoders.pipeline_folder import Pipeline, PipelineSpec
from dumo.evaluation import BundledProtocol, ImageProtocol, MetricProtocol
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.path import FlowPath, Linear
from dumo.flow.precision import Precision
from dumo.flow.reading import available_readings
from dumo.flow.solver import Solver
from dumo.nets import Net, Pretrained
from dumo.objectives import Objective
from dumo.runtime.formatting import minutes_text
from dumo.runtime.limits import PASSES, SAMPLES, STEPS
from dumo.training.settings import Train

# QUIET: the field is hidden at its default. FREE: it may change when a run is resumed.
from dumo.types import FREE, QUIET, Readings, Spec

S = TypeVar("S", bound=Spec)

# The number of validation samples (our choice), clipped to the limits of the protocol.
_VALIDATION_SAMPLES = 500
_MIN_SAMPLES = 2  # for protocols that name no least number: a variance needs two

# Passes through the net for one sample (NFE); a guided pass calls the net twice. A solver says which numbers it can
# make.
NumPasses = Annotated[int, Field(le=PASSES)]


class Sampling(Spec):
    """How samples are made by default."""

    solver: Solver
    guide: CFG = Field(default=CFG(), json_schema_extra=QUIET)  # no guidance by default
    # Values of conditioning scalars that the objective declares, by name.
    knobs: dict[str, float] = Field(default_factory=dict[str, float])
    nfe: tuple[NumPasses, ...] = Field(default=(1, 2, 4), min_length=1)  # a sheet of samples for each
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)  # of the noise
    precision: Precision | None = None  # of the net's passes; None: as in training. Decoders stay in float32


class Evaluation(Spec):
    """How a run is judged: at its end, and in training (`validation`)."""

    protocol: MetricProtocol
    # A split of the data's folder that no training sees, to judge samples against; None: the data that are trained on.
    split: str | None = None
    # Which templates of captions samples are made of: those that were trained on, or those held out.
    captions: Literal["seen", "held"] = Field(default="seen", json_schema_extra=QUIET)
    nfe: tuple[NumPasses, ...] = Field(default=(1, 2), min_length=1)  # scores for each
    # Numbers of passes that are also judged with Euler steps; (): none.
    contrast: tuple[Annotated[NumPasses, Field(ge=1)], ...] = (1,)
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)  # of the noise
    # Steps of training between two validations; 0: none.
    every: int = Field(default=0, ge=0, le=STEPS, json_schema_extra=QUIET)
    # Samples of a validation; None: _VALIDATION_SAMPLES, or what the protocol judges at least, or at most.
    few: int | None = Field(default=None, ge=2, le=SAMPLES)
    # Whether the folder best/ keeps the weights whose validation has the best score.
    best: bool = Field(default=False, json_schema_extra=QUIET)

    @property
    def min_samples(self) -> int:
        """The fewest samples that the protocol judges in training, without Inception's Fréchet distances."""
        if isinstance(self.protocol, ImageProtocol):
            return self.protocol.standard.kid_subset_size
        if isinstance(self.protocol, BundledProtocol):
            return self.protocol.standard.min_samples
        return _MIN_SAMPLES

    @property
    def validation(self) -> "Evaluation":
        """How a run is judged in training: at the first number of passes, by few samples.

        The seed is the next one, so that the noise that chooses a best step is not the noise of the final numbers.
        Protocols of Inception's features leave out Fréchet distances, which take thousands of samples.
        """
        num_samples = self.few
        if num_samples is None:
            num_samples = max(self.min_samples, min(self.protocol.total, _VALIDATION_SAMPLES))
        protocol = self.protocol.model_copy(update={"samples": num_samples})
        if isinstance(protocol, ImageProtocol):
            protocol = protocol.model_copy(update={"frechet": False})
        return self.model_copy(update={"protocol": protocol, "nfe": self.nfe[:1], "seed": self.seed + 1})


class StandaloneParts(Spec):
    """Parts of a run that Python code gives by themselves, each validated as in a run (`dumo.config.load.parse`)."""

    objective: Objective | None = None
    data: Data | None = None


class Run(Spec):
    """All parts of a run. Raises pydantic's ValidationError if a field is wrong, or two parts do not fit."""

    about: str = Field(json_schema_extra=FREE)  # what the run is, in one line
    # A folder of diffusers, with the model that is tuned, and what codecs and texts of `kind: pipeline` are read from.
    pipeline: Pipeline | None = None
    data: Data
    net: Net
    objective: Objective
    path: FlowPath = Linear()
    teacher: Teacher | None = None
    start: Start | None = None
    train: Train
    sample: Sampling = Field(json_schema_extra=FREE)
    evaluate: Evaluation = Field(json_schema_extra=FREE)
    # What `dumo.run.resolve` found on disk, by the dotted path of its field.
    resolved: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue], json_schema_extra=FREE)

    def model_post_init(self, _: object) -> None:
        """Hand the pipeline to the parts that read it. Pydantic calls this when it has validated the fields."""
        for name in ("data", "net"):
            part = with_pipeline(getattr(self, name), self.pipeline)
            object.__setattr__(self, name, part)  # specs are frozen, but nobody has seen this one yet

    @model_validator(mode="after")
    def _require_parts_fit(self) -> Self:
        check(self)
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy as pydantic does. The parts that read the pipeline then read the copy's."""
        run_copy = super().model_copy(update=update, deep=deep)
        run_copy.model_post_init(None)  # which pydantic does not call for a copy, as it validates none
        return run_copy

    def __repr__(self) -> str:
        """One line; `dumo show` prints all of it."""
        minutes = self.train.minutes
        length = f"{self.train.steps:,} steps" if minutes is None else minutes_text(minutes)
        return f"<{self.objective.kind} on {self.data.kind}, net {self.net.kind}, {length}>"

    __str__ = __repr__

    @property
    def shown_data(self) -> ShownData:
        """The images or points that reports show: of latents, the images that were encoded."""
        return shown_data(self.data)

    @property
    def shown_shape(self) -> tuple[int, ...]:
        """The shape of a sample as reports show it: (channels, height, width) of an image, (2,) of a point."""
        return self.shown_data.shape

    @property
    def readings(self) -> Readings:
        """The readings that the objective trains, such as the flow map, before there is a net."""
        return available_readings(self.objective)

    @property
    def conditions(self) -> Conditions:
        """The classes or captions that the net is conditioned on."""
        return Conditions(self.data)

    @property
    def has_subject(self) -> bool:
        """Whether adapters for a subject, a thing or style of the user's own, are trained on top of a few-step run.

        `start` names the few-step run, whose own adapters stay frozen (docs/personal.md).
        """
        net = self.net
        if self.start is None or not isinstance(net, Pretrained) or net.weights != "source":
            return False
        return bool(net.lora and net.lora.subject)

    @property
    def knobs(self) -> dict[str, float]:
        """The conditioning scalars of the net in sampling: the objective's defaults, changed by `sample.knobs`."""
        return {**self.objective.needs.knobs, **self.sample.knobs}

    @property
    def precision(self) -> Precision:
        """The precision of the net's passes in sampling."""
        return self.sample.precision or self.train.precision

    @property
    def training_guidance(self) -> GuidanceScale:
        """The guidance of the velocity that the net learns, by its teacher or else by the objective."""
        if self.teacher and self.teacher.guide.active:
            return GuidanceScale(self.teacher.guide.scale, "teacher.guide", "teacher.guide.scale=1")
        return GuidanceScale.of(self.objective.needs)


def with_pipeline(part: S, pipeline: Pipeline | None) -> S:
    """Return a part of a run, all of whose own parts that read a pipeline read this one."""
    changed: dict[str, Spec] = {}
    for name in type(part).model_fields:
        field = getattr(part, name)
        if isinstance(field, Spec):
            new_field = with_pipeline(field, pipeline)
            if new_field is not field:
                changed[name] = new_field
    if changed:
        part = part.model_copy(update=changed)
    return part.within(pipeline) if isinstance(part, PipelineSpec) else part
