"""The parts of a run, as one tree of specs; whether they fit one another is not looked at here."""

from dataclasses import replace
from math import prod
from typing import Annotated, Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor, nn

from dumo import room
from dumo.bound import PASSES
from dumo.config.error import nearest
from dumo.config.teacher import Start, Teacher
from dumo.data import Data, Digits, Images, Latents, Moons
from dumo.data.caption import Captioning, Files, Templates
from dumo.flow.path import Linear, Path
from dumo.flow.precision import Precision
from dumo.io.text import brief
from dumo.nets import Net, Pretrained
from dumo.objectives import Objective
from dumo.protocols import MetricProtocol
from dumo.random import stream
from dumo.sampling.guidance import CFG, GuidanceScale
from dumo.sampling.solver import Solver
from dumo.training.spec import Train
from dumo.types import FREE, Reads, Spec, UserError

Passes = Annotated[int, Field(le=PASSES)]  # through the net; from which on, a solver says


class Sampling(Spec):
    """How samples are made when nothing else is asked."""

    solver: Solver
    guide: CFG = CFG()  # none; a guided reading is two passes through the net
    knobs: dict[str, float] = Field(default_factory=dict[str, float])  # inputs that an objective lets be set
    nfe: tuple[Passes, ...] = Field(default=(1, 2, 4), min_length=1)  # readings of the net; a sheet of samples for each
    seed: int = Field(default=0, ge=0)
    precision: Precision | None = None  # of the net's passes; None: as in training. Decoders stay in float32


class Evaluation(Spec):
    """How a run is judged."""

    protocol: MetricProtocol
    # Of captions that are templates: those trained on, or those held out. Else there are none held out.
    captions: Literal["seen", "held"] = Field(default="seen", exclude_if=lambda asked: asked == "seen")
    nfe: tuple[Passes, ...] = Field(default=(1, 2), min_length=1)
    # Passes of Euler steps that stand beside, with those of nfe; (): none.
    contrast: tuple[Annotated[Passes, Field(ge=1)], ...] = (1,)
    seed: int = Field(default=0, ge=0)


class Tree(Spec):
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
    def images(self) -> Digits | Images | Moons:
        """The data as they are shown: of latents, the images that are encoded."""
        return self.data.images if isinstance(self.data, Latents) else self.data

    @property
    def pixels(self) -> tuple[int, ...]:
        """The shape of what is shown: of an image that a codec decodes, else of a sample as the net makes it."""
        return self.images.shape

    @property
    def reads(self) -> Reads:
        """The readings that the objective will teach. They answer nothing yet: there is no net."""
        found = self.objective.read(nn.Identity())
        if found.flow_map and found.hops is None and not self.objective.times.between:
            return replace(found, hops=lambda t, s: s == 0)
        return found

    @property
    def classes_known(self) -> bool:
        """False where they are to be counted, and the data are not there yet: until then there are none."""
        return getattr(self.images, "names", ()) is not None

    @property
    def captions(self) -> Captioning | None:
        """What stands in the place of classes; None: nothing does."""
        return getattr(self.data, "captions", None)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or the captions; () where there are none, or they have numbers only."""
        if self.captions is None or isinstance(self.data, Moons):
            return getattr(self.images, "names", None) or ()
        try:
            return self.data.caption_texts()
        except UserError:  # images, and what is written of them, may lie elsewhere
            return ()

    def class_name(self, c: int) -> str:
        """What a class is called: its folder's name, or the caption, else its number."""
        if self.captions and c == self.data.classes:
            return "no caption"
        names = self.class_names
        return names[c] if c < len(names) else str(c)

    def class_index(self, text: str) -> int:
        """The number of the class that is meant by a name or a number. Raises UserError where there is none."""
        names, word = self.class_names, brief(text.strip())
        if text.strip() in names:
            return names.index(text.strip())
        if word.isdecimal() and int(word) < self.data.classes:
            return int(word)
        if not self.data.classes:
            raise UserError(f"label '{word}' is out of range: this run has no classes, so give no labels")
        way = f"labels run from 0 to {self.data.classes - 1}"
        if word.isdecimal() or not names:
            raise UserError(f"label '{word}' is out of range: {way}")
        if self.captions:
            raise UserError(f"there is no caption '{word}' in the data: give it as a prompt; by number, {way}")
        raise UserError(f"there is no class '{word}'; {nearest(word, [*names])}; by number, {way}")

    def conditions(self, labels: Int64[Tensor, " n"], *, held: bool = False) -> Int64[Tensor, " n"]:
        """The condition of samples of these classes: the class, or a caption of it, its templates in turn.

        `held`: of the templates that are held out. Where captions were written of each image there are no classes: then
        one of every k-th image, or of all in turn. Raises UserError where nothing is held out, or captions are missing.
        """
        match self.captions:
            case Templates() as captions:
                return captions.numbers(labels, self.data.labels, held=held)
            case Files() if isinstance(self.data, Images | Latents):
                told, n = self.data.told(), len(labels)
                images = torch.arange(n) * max(len(told.ends), n) // n % len(told.ends)
                return told.drawn(images, "conditions", batch=n)
            case _:
                return labels

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The net at step 0, its weights keyed by the run's seed: the same on every device.

        Raises UserError, before it is made, where the device has less memory than that.
        """
        self.require_room(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.train.seed, "weights").initial_seed())
            return self.net.build(self.objective.needs, self.data.shape, self.data.classes).to(device)

    def outline(self, *, short: bool = False) -> nn.Module:
        """The net's sizes without its numbers, on the meta device. Raises UserError where they do not fit the data.

        `short`: of a net that takes long, of its first blocks alone.
        """
        net = self.net.short if short and isinstance(self.net, Pretrained) else self.net
        with torch.device("meta"):
            return net.build(self.objective.needs, self.data.shape, self.data.classes)

    def require_room(self, device: torch.device | str, copies: int = 0, rows: int = 0, share: int = 1) -> None:
        """Raise UserError where a device has less memory than the net, so many copies of what is trained of it, both
        in so many shares, and rows with their noise take.

        That is the least: what passes make on their way comes on top (`dumo.preflight.plan`).
        """
        net, numbers = self.outline(), 2 * rows * prod(self.data.shape)
        whole = sum(value.nbytes for value in net.state_dict().values())
        frozen = sum(p.nbytes for p in net.parameters() if not p.requires_grad)
        size = (whole + copies * (whole - frozen)) // share + numbers * torch.float32.itemsize
        what = "weights, gradients, optimizer, averages and a batch take" if rows else "the net takes"
        way = "take a smaller net (net.width, net.depth)" + " or batch (train.batch)" * bool(rows)
        room.require(size, what, way, device)

    @property
    def knobs(self) -> dict[str, float]:
        """The knobs of the net as samples are made: the objective's, but where `sample.knobs` sets them."""
        return {**self.objective.needs.knobs, **self.sample.knobs}

    @property
    def precision(self) -> Precision:
        """The precision of the net's passes where samples are made."""
        return self.sample.precision or self.train.precision

    @property
    def guided(self) -> GuidanceScale:
        """What the net's velocity is guided by in training: by the objective, or by its teacher."""
        if self.teacher and self.teacher.guide.active:
            return GuidanceScale(self.teacher.guide.scale, "teacher.guide", "teacher.guide.scale=1")
        return GuidanceScale.of(self.objective.needs)
