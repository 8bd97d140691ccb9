"""`Run`: the configuration of a run. Its fields are the keys of run.yaml.

Validation also checks that the components are compatible (`dumo.config.check_spec`). `Sampling` and `Evaluation` are
the settings of sampling and evaluation; the other components are defined in the subpackages that use them.
`StandaloneParts` validates an objective or data without a run.
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
# The minimum for protocols without their own: a variance needs two samples.
_MIN_SAMPLES = 2

# The NFE of a sample. A guided pass calls the network twice. Solvers may support only some values.
NumPasses = Annotated[int, Field(le=PASSES)]


class Sampling(Spec):
    """The default settings of sampling."""

    solver: Solver
    guide: CFG = Field(default=CFG(), json_schema_extra=QUIET)  # no guidance by default
    # Values of the objective's conditioning scalars, by name.
    knobs: dict[str, float] = Field(default_factory=dict[str, float])
    nfe: tuple[NumPasses, ...] = Field(default=(1, 2, 4), min_length=1)  # one sheet of samples per value
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)  # of the noise
    # The precision of the network. None means that of training. Decoders use float32.
    precision: Precision | None = None


class Evaluation(Spec):
    """The settings of evaluation, after training and during training (`validation`)."""

    protocol: MetricProtocol
    # The split of the data to compare samples with. None means the training data.
    split: str | None = None
    # Use the caption templates of training, or the held-out ones.
    captions: Literal["seen", "held"] = Field(default="seen", json_schema_extra=QUIET)
    nfe: tuple[NumPasses, ...] = Field(default=(1, 2), min_length=1)
    # The NFE that are also evaluated with Euler steps.
    contrast: tuple[Annotated[NumPasses, Field(ge=1)], ...] = (1,)
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)  # of the noise
    # Training steps between two validations. 0 disables validation.
    every: int = Field(default=0, ge=0, le=STEPS, json_schema_extra=QUIET)
    # The number of validation samples. None means _VALIDATION_SAMPLES, clipped to the limits of the protocol.
    few: int | None = Field(default=None, ge=2, le=SAMPLES)
    # Whether to keep the weights with the best validation score in the folder best/.
    best: bool = Field(default=False, json_schema_extra=QUIET)

    @property
    def min_samples(self) -> int:
        """The minimum number of validation samples, without Inception's Fréchet distances."""
        if isinstance(self.protocol, ImageProtocol):
            return self.protocol.standard.kid_subset_size
        if isinstance(self.protocol, BundledProtocol):
            return self.protocol.standard.min_samples
        return _MIN_SAMPLES

    @property
    def validation(self) -> "Evaluation":
        """The settings of validation during training: the first NFE and few samples.

        The seed is increased by 1, so that the best step is not selected with the noise of the final evaluation.
        Protocols with Inception features omit Fréchet distances, which need thousands of samples.
        """
        num_samples = self.few
        if num_samples is None:
            num_samples = max(self.min_samples, min(self.protocol.total, _VALIDATION_SAMPLES))
        protocol = self.protocol.model_copy(update={"samples": num_samples})
        if isinstance(protocol, ImageProtocol):
            protocol = protocol.model_copy(update={"frechet": False})
        return self.model_copy(update={"protocol": protocol, "nfe": self.nfe[:1], "seed": self.seed + 1})


class StandaloneParts(Spec):
    """An objective or data that are validated without a run (`dumo.config.load.parse`)."""

    objective: Objective | None = None
    data: Data | None = None


class Run(Spec):
    """All components of a run. Raises ValidationError for invalid fields, and UserError for incompatible components."""

    about: str = Field(json_schema_extra=FREE)  # a description in one line
    # The diffusers pipeline that contains the model to fine-tune, and the codec and text encoders of `kind: pipeline`.
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
    # Values that `dumo.run.resolve` determined, by dotted path of the field.
    resolved: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue], json_schema_extra=FREE)

    def model_post_init(self, _: object) -> None:
        """Pass the pipeline to the components that use it. Pydantic calls this after validating the fields."""
        for name in ("data", "net"):
            part = with_pipeline(getattr(self, name), self.pipeline)
            # Specs are frozen, but this one is still under construction.
            object.__setattr__(self, name, part)

    @model_validator(mode="after")
    def _require_parts_fit(self) -> Self:
        check(self)
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the run. Components that use the pipeline use that of the copy."""
        run_copy = super().model_copy(update=update, deep=deep)
        # Pydantic does not validate copies, so it does not call this method.
        run_copy.model_post_init(None)
        return run_copy

    def __repr__(self) -> str:
        """Summarize the run in one line."""
        minutes = self.train.minutes
        length = f"{self.train.steps:,} steps" if minutes is None else minutes_text(minutes)
        return f"<{self.objective.kind} on {self.data.kind}, net {self.net.kind}, {length}>"

    __str__ = __repr__

    @property
    def shown_data(self) -> ShownData:
        """The images or points that reports show. For latents, these are the encoded images."""
        return shown_data(self.data)

    @property
    def shown_shape(self) -> tuple[int, ...]:
        """The shape of a decoded sample: (channels, height, width) for images, (2,) for points."""
        return self.shown_data.shape

    @property
    def readings(self) -> Readings:
        """The readings that the objective trains, such as the flow map."""
        return available_readings(self.objective)

    @property
    def conditions(self) -> Conditions:
        """The classes or captions on which the network is conditioned."""
        return Conditions(self.data)

    @property
    def has_subject(self) -> bool:
        """Whether adapters for a subject or style are trained on top of a few-step run (docs/personal.md).

        `start` is the few-step run, whose adapters are frozen.
        """
        net = self.net
        if self.start is None or not isinstance(net, Pretrained) or net.weights != "source":
            return False
        return bool(net.lora and net.lora.subject)

    @property
    def knobs(self) -> dict[str, float]:
        """The conditioning scalars in sampling: the objective's defaults, updated with `sample.knobs`."""
        return {**self.objective.needs.knobs, **self.sample.knobs}

    @property
    def precision(self) -> Precision:
        """The precision of the network in sampling."""
        return self.sample.precision or self.train.precision

    @property
    def training_guidance(self) -> GuidanceScale:
        """The guidance of the velocity target, from the teacher or the objective."""
        if self.teacher and self.teacher.guide.active:
            return GuidanceScale(self.teacher.guide.scale, "teacher.guide", "teacher.guide.scale=1")
        return GuidanceScale.of(self.objective.needs)


def with_pipeline(part: S, pipeline: Pipeline | None) -> S:
    """Return a component with this pipeline in all nested specs that use one."""
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
