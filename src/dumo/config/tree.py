"""The parts of a run, as one tree of specs: `Tree`, with `Sampling` and `Evaluation`.

`dumo.config.spec.Run` is a `Tree` whose parts were checked against one another (`dumo.config.check`). Each field is a
key of run.yaml.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, JsonValue

from dumo.config.conditions import Conditions, shown
from dumo.config.teacher import Start, Teacher
from dumo.data import Data, ShownData
from dumo.encoders.pipeline import Pipeline, with_pipeline
from dumo.evaluation import MetricProtocol, is_of_inception, is_shipped
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.path import Linear, Path
from dumo.flow.precision import Precision
from dumo.flow.reading import taught_readings
from dumo.flow.solver import Solver
from dumo.nets import Net, is_pretrained
from dumo.objectives import Objective
from dumo.runtime.limits import PASSES, SAMPLES, STEPS
from dumo.training.spec import Train
from dumo.types import FREE, QUIET, Reads, Spec

FEW = 500  # samples by which a run in training is judged, where its protocol judges so few: ours
Passes = Annotated[int, Field(le=PASSES)]  # through the net; a solver says how few it can make


class Sampling(Spec):
    """How samples are made by default."""

    solver: Solver
    guide: CFG = Field(default=CFG(), json_schema_extra=QUIET)  # none; a guided reading is two passes through the net
    knobs: dict[str, float] = Field(default_factory=dict[str, float])  # inputs that an objective lets be set
    nfe: tuple[Passes, ...] = Field(default=(1, 2, 4), min_length=1)  # readings of the net; a sheet of samples for each
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)
    precision: Precision | None = None  # of the net's passes; None: as in training. Decoders stay in float32


class Evaluation(Spec):
    """How a run is judged."""

    protocol: MetricProtocol
    split: str | None = None  # of the data's folder, that no training sees: samples are judged against it
    # Templates of captions: those that were trained on, or those held out.
    captions: Literal["seen", "held"] = Field(default="seen", json_schema_extra=QUIET)
    nfe: tuple[Passes, ...] = Field(default=(1, 2), min_length=1)
    # Numbers of passes that are also judged with Euler steps; (): none.
    contrast: tuple[Annotated[Passes, Field(ge=1)], ...] = (1,)
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)
    # Steps after which a run in training is judged (`validation`); 0: never.
    every: int = Field(default=0, ge=0, le=STEPS, json_schema_extra=QUIET)
    few: int | None = Field(default=None, ge=2, le=SAMPLES)  # samples then; None: FEW, or as few as the protocol judges
    best: bool = Field(default=False, json_schema_extra=QUIET)  # keep the weights of the best score in best/

    @property
    def fewest(self) -> int:
        """The fewest samples that the protocol judges, where Fréchet distances of Inception's features are left out."""
        if is_of_inception(self.protocol):
            return self.protocol.standard.subset
        if is_shipped(self.protocol):
            return self.protocol.measure.fewest
        return 2

    @property
    def validation(self) -> "Evaluation":
        """How a run is judged in training: at the first number of passes, by few samples.

        The seed is the next one, so that the noise that chooses a best step is not the noise of the final numbers.
        Protocols of Inception's features leave out Fréchet distances, which take thousands of samples.
        """
        count = self.few or max(self.fewest, min(self.protocol.total, FEW))
        fields = {"samples": count}
        if is_of_inception(self.protocol):
            fields["frechet"] = False
        protocol = self.protocol.model_copy(update=fields)
        return self.model_copy(update={"protocol": protocol, "nfe": self.nfe[:1], "seed": self.seed + 1})


class Parts(Spec):
    """Some parts of a run, to validate what Python gives by itself (`dumo.config.load.parse`)."""

    objective: Objective | None = None
    data: Data | None = None


T = TypeVar("T", bound="Tree")


class Tree(Spec):
    """All parts of a run."""

    about: str = Field(json_schema_extra=FREE)  # one line
    # A folder of diffusers: the model that is tuned, and codecs and texts of kind pipeline, are of it.
    pipeline: Pipeline | None = None
    data: Data
    net: Net
    objective: Objective
    path: Path = Linear()
    teacher: Teacher | None = None
    start: Start | None = None
    train: Train
    sample: Sampling = Field(json_schema_extra=FREE)
    evaluate: Evaluation = Field(json_schema_extra=FREE)
    # Fields that `dumo.run.resolve` filled, by dotted path.
    resolved: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue], json_schema_extra=FREE)

    def model_post_init(self, _: object) -> None:
        """Hand the pipeline to the parts that read it."""
        for name in ("data", "net"):
            object.__setattr__(self, name, with_pipeline(getattr(self, name), self.pipeline))

    def model_copy(self: T, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> T:
        """Copy as pydantic does. The parts that read the pipeline then read the copy's."""
        run_copy = super().model_copy(update=update, deep=deep)
        run_copy.model_post_init(None)
        return run_copy

    def __repr__(self) -> str:
        """One line; `dumo show` prints all of it."""
        return f"<{self.objective.kind} on {self.data.kind}, net {self.net.kind}, {self.train.steps:,} steps>"

    __str__ = __repr__

    @property
    def images(self) -> ShownData:
        """The images or points that are shown: of latents, the images that were encoded."""
        return shown(self.data)

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of what is shown: a decoded image, or a sample of the net."""
        return self.images.shape

    @property
    def reads(self) -> Reads:
        """The readings that the objective will teach a net. They are not for sampling: there is no net yet."""
        return taught_readings(self.objective)

    @property
    def conditions(self) -> Conditions:
        """The classes or captions that the net is conditioned on."""
        return Conditions(self.data)

    @property
    def has_subject(self) -> bool:
        """Whether adapters are trained on top of what another run trained, which `start` names and is frozen."""
        net = self.net
        if self.start is None or not is_pretrained(net) or net.weights != "source":
            return False
        return bool(net.lora and net.lora.subject)

    @property
    def knobs(self) -> dict[str, float]:
        """The knobs of the net in sampling: the objective's, changed by `sample.knobs`."""
        return {**self.objective.needs.knobs, **self.sample.knobs}

    @property
    def precision(self) -> Precision:
        """The precision of the net's passes in sampling."""
        return self.sample.precision or self.train.precision

    @property
    def guided(self) -> GuidanceScale:
        """The guidance of the net's velocity in training, by the objective or its teacher."""
        if self.teacher and self.teacher.guide.active:
            return GuidanceScale(self.teacher.guide.scale, "teacher.guide", "teacher.guide.scale=1")
        return GuidanceScale.of(self.objective.needs)
