"""A run: one tree of specs, complete, that a YAML file holds and that stands in every run's folder."""

from itertools import pairwise

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import nn

from dumo.config.teacher import Start, Teacher
from dumo.data import Data, Latents
from dumo.data.augment import Edm
from dumo.flow.guide import Guide
from dumo.flow.path import Linear, Path
from dumo.flow.secant import demand
from dumo.flow.times import Pair
from dumo.nets import Net
from dumo.nets.precondition import VELOCITIES
from dumo.objectives import Objective
from dumo.protocols import MetricProtocol
from dumo.random import stream
from dumo.sampling.guidance import CFG, GuidanceScale
from dumo.sampling.solver import Solver, check
from dumo.training.spec import Train
from dumo.types import FREE, Reads, Spec, UserError


class Sampling(Spec):
    """How samples are made when nothing else is asked."""

    solver: Solver
    guide: CFG = CFG()  # none; a guided reading is two passes through the net
    knobs: dict[str, float] = Field(default_factory=dict[str, float])  # inputs that an objective lets be set
    nfe: tuple[int, ...] = Field(default=(1, 2, 4), min_length=1)  # readings of the net; a sheet of samples for each
    seed: int = Field(default=0, ge=0)


class Evaluation(Spec):
    """How a run is judged."""

    protocol: MetricProtocol
    nfe: tuple[int, ...] = Field(default=(1, 2), min_length=1)
    contrast: tuple[PositiveInt, ...] = (1,)  # passes of Euler steps that stand beside, with those of nfe; (): none
    seed: int = Field(default=0, ge=0)


class Run(Spec):
    """All there is to know to make a run again."""

    about: str = Field(json_schema_extra=FREE)  # one line
    data: Data
    net: Net
    objective: Objective
    path: Path = Linear()
    teacher: Teacher | None = None
    start: Start | None = None
    train: Train
    sample: Sampling = Field(json_schema_extra=FREE)
    evaluate: Evaluation = Field(json_schema_extra=FREE)

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of what is shown: of an image that a codec decodes, else of a sample as the net makes it."""
        return self.data.images.shape if isinstance(self.data, Latents) else self.data.shape

    @property
    def reads(self) -> Reads:
        """The readings that the objective will teach. They answer nothing yet: there is no net."""
        return self.objective.read(nn.Identity())

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The net at step 0, its weights keyed by the run's seed: the same on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.train.seed, "weights").initial_seed())
            return self.net.build(self.objective.needs, self.data.shape, self.data.classes).to(device)

    def outline(self) -> nn.Module:
        """The net's sizes without its numbers, on the meta device. Raises UserError where they do not fit the data."""
        with torch.device("meta"):
            return self.net.build(self.objective.needs, self.data.shape, self.data.classes)

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        """Refuse parts that do not fit one another, before any work."""
        self.outline()
        self._check_augment()
        if self.path.kind not in self.objective.needs.paths:
            raise UserError(
                f"objective '{self.objective.kind}' has its formulas for path {_or(self.objective.needs.paths)}, "
                f"not '{self.path.kind}'"
            )
        self._check_precondition()
        slope = getattr(self.objective, "slope", None)
        if slope and getattr(self.objective, "derives", True):
            slope.check(self.train.precision, self.net.time_scale)
        if rate := getattr(self.objective, "rate", None):
            rate.check(self.train.precision, self.net.time_scale)
        demand(self.train.precision, getattr(self.objective, "amplifies", 0.0), self.objective.kind)
        self._check_groups()
        self._check_guidance()
        self._check_teacher()
        self._check_start()
        self._check_knobs()
        check(self.sample.solver, self.reads, *self.sample.nfe, *self.evaluate.nfe)
        self.evaluate.protocol.check(self.pixels, self.data.classes)
        return self

    def check_guided(self, guide: CFG, name: str = "sample.guide", whose: str = "") -> None:
        """Refuse to read the run's net guided as `name` asks, with a UserError: untaught without a label, or twice.

        `whose` names the run where it is read for another.
        """
        guide.check(self.data.kind, self.data.classes, self.objective.drop, self.guided, name=name, whose=whose)
        if guide.active and self.objective.needs.knobs:
            of = whose and f" of {whose}"
            raise UserError(
                f"{name}.scale = {guide.scale:g} would guide once more what the knobs of objective "
                f"'{self.objective.kind}'{of} guide already: set {name}.scale=1, and sample.knobs{of}"
            )

    @property
    def knobs(self) -> dict[str, float]:
        """The knobs of the net as samples are made: the objective's, but where `sample.knobs` sets them."""
        return {**self.objective.needs.knobs, **self.sample.knobs}

    @property
    def guided(self) -> GuidanceScale:
        """What the net's velocity is guided by in training: by the objective, or by its teacher."""
        if self.teacher and self.teacher.guide.active:
            return GuidanceScale(self.teacher.guide.scale, "teacher.guide", "teacher.guide.scale=1")
        return self._guided

    @property
    def _guided(self) -> GuidanceScale:
        """What the objective guides its target by."""
        if guide := getattr(self.objective, "guide", None):
            return GuidanceScale(guide.scale)
        return GuidanceScale(getattr(self.objective, "scale", 1.0), "objective.scale", "objective.scale=1")

    def _check_guidance(self) -> None:
        """Refuse guidance without classes, on rows that do not come in whole groups, or twice."""
        guide: Guide | None = getattr(self.objective, "guide", None)
        opened = self._guided
        guided = guide.active if guide else opened.scale != 1
        if guided and not self.data.classes:
            raise UserError(
                f"{opened.field} asks for guidance, but data '{self.data.kind}' has no classes to guide by: "
                f"set {opened.off}"
            )
        if guide and guide.random and self.train.batch % (group := guide.every * self.train.accumulate):
            raise UserError(
                f"objective.guide.fraction = {guide.fraction:g} picks one of every {guide.every} rows of a piece, but "
                f"train.batch = {self.train.batch} is no multiple of {group} ({guide.every} * train.accumulate): "
                "change train.batch, train.accumulate or objective.guide.fraction"
            )
        self.check_guided(self.sample.guide)

    def _check_teacher(self) -> None:
        """Refuse a teacher who says nothing to the objective, or whose guidance is there twice or without classes.

        What the teacher itself can be asked for is seen when it is opened.
        """
        if not self.teacher:
            return
        if not self.teacher.pairs and not getattr(self.objective, "teachable", True):
            raise UserError(
                f"objective '{self.objective.kind}' learns from no velocity, so a teacher's says nothing to it: set "
                "teacher.pairs, or teacher=null"
            )
        guide, opened, knobs = self.teacher.guide, self._guided, self.objective.needs.knobs
        guide.check(self.data.kind, self.data.classes, 1.0, GuidanceScale(), name="teacher.guide")
        if guide.active and (knobs or opened.active):
            field, off = (opened.field, opened.off) if opened.active else ("objective.w", "objective.w=null")
            raise UserError(
                f"{field} would guide what teacher.guide has guided: set teacher.guide.scale=1, or train with {off}"
            )

    def _check_start(self) -> None:
        """Refuse to begin heads that are not there."""
        there = self.objective.needs.heads
        if strange := [name for name in (self.start.heads if self.start else ()) if name not in there]:
            raise UserError(
                f"start.heads.{strange[0]}: objective '{self.objective.kind}' has no such head, its heads are "
                f"{', '.join(there)}"
            )

    def _check_knobs(self) -> None:
        """Refuse knobs that the net does not have, and those of guidance where there is nothing to guide by."""
        kind, there = self.objective.kind, self.objective.needs.knobs
        if strange := [name for name in self.sample.knobs if name not in there]:
            have = f"its knobs are {', '.join(there)}" if there else "it has none: set sample.knobs={}"
            raise UserError(f"sample.knobs.{strange[0]}: objective '{kind}' has no such knob, {have}")
        if there and not self.data.classes:
            raise UserError(
                f"objective '{kind}' teaches its knobs {', '.join(there)} to guide, but data '{self.data.kind}' has no "
                "classes to guide by: train without guidance, which of 'imf' is objective.w=null"
            )

    def _check_groups(self) -> None:
        """Refuse pieces of a batch that part rows which belong together, and batches that lack one kind of row."""
        times, batch = self.objective.times, self.train.batch
        group = getattr(times, "group", 1)
        if group > 1 and batch % (group * self.train.accumulate):
            raise UserError(
                f"objective.times of kind '{times.kind}' keeps {group} rows together, so train.batch = {batch} must be "
                f"a multiple of {group * self.train.accumulate} ({group} * train.accumulate; with several processes, "
                "times their number)"
            )
        if isinstance(times, Pair) and 0 < times.velocity_ratio < 1:
            moving, n = times.moving(batch), self.train.accumulate
            for start, end in pairwise(batch * i // n for i in range(n + 1)):
                if len(set(moving[start:end])) == 1:
                    raise UserError(
                        f"train.batch = {batch} has a piece of {end - start} rows (train.accumulate = {n}) without one "
                        f"with {'r = t' if moving[start] else 'r < t'} at objective.times.velocity_ratio = "
                        f"{times.velocity_ratio:g}: raise train.batch"
                    )

    def _check_precondition(self) -> None:
        """Refuse preconditioning that is made for other heads, or for another path."""
        others = set(self.objective.needs.heads) - set(VELOCITIES)
        if self.net.precondition != "none" and getattr(self.objective, "signed", False):
            raise UserError(
                f"net.precondition '{self.net.precondition}' is not made for the negative times of objective "
                f"'{self.objective.kind}': set net.precondition=none"
            )
        if self.net.precondition != "none" and (others or self.path.kind != "linear"):
            what = f"path '{self.path.kind}'" if self.path.kind != "linear" else f"head {_or(tuple(sorted(others)))}"
            raise UserError(
                f"net.precondition '{self.net.precondition}' is made for velocities on path 'linear' (heads "
                f"{_or(VELOCITIES)}), not for {what}: set net.precondition=none"
            )

    def _check_augment(self) -> None:
        """Refuse augmentation that the net is not told of, or told wrong."""
        images = self.data.images if isinstance(self.data, Latents) else self.data
        augment: Edm | None = getattr(images, "augment", None)
        if augment and isinstance(self.data, Latents):
            raise UserError("data.images.augment: images are encoded as they are: set data.images.augment=null")
        told, takes = augment.numbers if augment else 0, getattr(self.net, "augment", 0)
        if told != takes:
            way = f"net.augment={told}" if told == 0 or self.net.kind == "unet" else f"net.kind=unet net.augment={told}"
            raise UserError(
                f"data '{self.data.kind}' describes how an image was augmented by {told} numbers, net "
                f"'{self.net.kind}' takes {takes}: set {way}" + (", or data.augment=null" if told else "")
            )
        if augment and self.objective.drop:
            raise UserError(
                f"objective.drop = {self.objective.drop:g} would tell the net of so many augmented images that they "
                "are not, and samples would look augmented: set objective.drop=0, or data.augment=null"
            )


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(f"'{name}'" for name in names)
