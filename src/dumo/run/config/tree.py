"""The parts of a run, as one tree of specs; `dumo.run.config.check` sees whether they fit together."""

from dataclasses import replace
from math import prod
from typing import Annotated, Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor, nn

from dumo.data import Data, Digits, Images, Latents, Moons
from dumo.data.caption import Captioning, Files, Templates
from dumo.evaluation import MetricProtocol
from dumo.flow.guide import CFG, GuidanceScale
from dumo.flow.path import Linear, Path
from dumo.flow.precision import Precision
from dumo.flow.solver import Solver
from dumo.io.read import brief
from dumo.nets import Net, Pretrained
from dumo.objectives import Objective
from dumo.run.config.error import nearest
from dumo.run.config.teacher import Start, Teacher
from dumo.runtime import memory
from dumo.runtime.bound import PASSES
from dumo.runtime.random import stream
from dumo.training.spec import Train
from dumo.types import FREE, QUIET, Reads, Spec, UserError

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
    # Templates of captions: those that were trained on, or those held out.
    captions: Literal["seen", "held"] = Field(default="seen", json_schema_extra=QUIET)
    nfe: tuple[Passes, ...] = Field(default=(1, 2), min_length=1)
    # Numbers of passes that are also judged with Euler steps; (): none.
    contrast: tuple[Annotated[Passes, Field(ge=1)], ...] = (1,)
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)


class Tree(Spec):
    """All parts of a run."""

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
    def images(self) -> Digits | Images | Moons:
        """The images or points that are shown: of latents, the images that were encoded."""
        return self.data.images if isinstance(self.data, Latents) else self.data

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of what is shown: a decoded image, or a sample of the net."""
        return self.images.shape

    @property
    def reads(self) -> Reads:
        """The readings that the objective will teach, of no net yet."""
        found = self.objective.read(nn.Identity())
        if found.flow_map and found.hops is None and not self.objective.times.between:
            return replace(found, hops=lambda t, s: s == 0)
        return found

    @property
    def classes_known(self) -> bool:
        """False if classes are to be counted, and the data are not there yet."""
        return getattr(self.images, "names", ()) is not None

    @property
    def captions(self) -> Captioning | None:
        """The captions that replace classes, if any."""
        return getattr(self.data, "captions", None)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or the captions; () if they have none."""
        if self.captions is None or isinstance(self.data, Moons):
            return getattr(self.images, "names", None) or ()
        try:
            return self.data.caption_texts()
        except UserError:  # images and captions may not be on this machine
            return ()

    def class_name(self, c: int) -> str:
        """The name of a class: its folder's, or the caption, else its number."""
        if self.captions and c == self.data.classes:
            return "no caption"
        names = self.class_names
        return names[c] if c < len(names) else str(c)

    def class_index(self, text: str) -> int:
        """The number of a class, given its name or number. Raises UserError if there is none."""
        names, word = self.class_names, brief(text.strip())
        if text.strip() in names:
            return names.index(text.strip())
        if word.isdecimal() and int(word) < self.data.classes:
            return int(word)
        if not self.data.classes:
            raise UserError(f"label '{word}' is out of range: this run has no classes, so give no labels")
        near = "" if word.isdecimal() or not names or self.captions else f" {nearest(word, [*names])};"
        give = "; give another caption as a prompt" if self.captions else ""
        raise UserError(f"label '{word}' is out of range:{near} labels run from 0 to {self.data.classes - 1}{give}")

    def conditions(self, labels: Int64[Tensor, " n"], *, held: bool = False) -> Int64[Tensor, " n"]:
        """The condition of samples of these classes: the class, or a caption of it, its templates in turn.

        `held`: of the templates that are held out. Captions that were written for each image have no classes: of these,
        one of every k-th image, or of all in turn. Raises UserError if nothing is held out, or captions are missing.
        """
        match self.captions:
            case Templates() as captions:
                return captions.numbers(labels, self.data.labels, held=held)
            case Files() if isinstance(self.data, Images | Latents):
                written, n = self.data.all_captions(), len(labels)
                images = torch.arange(n) * max(len(written.ends), n) // n % len(written.ends)
                return written.drawn(images, "conditions", batch=n)
            case _:
                return labels

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The net at step 0, its weights keyed by the run's seed: the same on every device.

        Raises UserError, before it is made, if the device has less memory than that.
        """
        self.require_room(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.train.seed, "weights").initial_seed())
            return self.net.build(self.objective.needs, self.data.shape, self.data.classes).to(device)

    def outline(self, *, short: bool = False) -> nn.Module:
        """The net on the meta device, without numbers. Raises UserError if it does not fit the data.

        `short`: only the first blocks of a pretrained net, which takes long.
        """
        net = self.net.short(1) if short and isinstance(self.net, Pretrained) else self.net
        with torch.device("meta"):
            return net.build(self.objective.needs, self.data.shape, self.data.classes)

    def require_room(self, device: torch.device | str, copies: int = 0, rows: int = 0, share: int = 1) -> None:
        """Raise UserError if a device has too little memory for the net, `copies` of its trained weights, and `rows`.

        Weights are split into `share` parts; rows count with their noise. That is the least: activations come on top
        (`dumo.run.plan.plan`).
        """
        net, numbers = self.outline(), 2 * rows * prod(self.data.shape)
        whole = sum(value.nbytes for value in net.state_dict().values())
        frozen = sum(p.nbytes for p in net.parameters() if not p.requires_grad)
        size = (whole + copies * (whole - frozen)) // share + numbers * torch.float32.itemsize
        what = "weights, gradients, optimizer, averages and a batch take" if rows else "the net takes"
        way = "take a smaller net (net.width, net.depth)" + " or batch (train.batch)" * bool(rows)
        memory.require(size, what, way, device)

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
