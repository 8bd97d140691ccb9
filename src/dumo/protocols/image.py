"""The named protocols of images: FID and its kin, on the features of Inception.

Which number a paper calls FID depends on the network, the resize before it, how colours are rounded, how many images,
of which classes, against which statistics. A name fixes all of it (`STANDARDS`); what may be changed shows in the name.
Fixed for all: the TF-2015 Inception, TensorFlow's resize without antialiasing, colours rounded to the nearest of 0 ..
255, classes in turn (i mod classes), Inception Score in splits of 5000 by number and without the last layer's bias,
3 neighbours. So `adm-*` are ADM's own definitions; ADM rounds distances of neighbours to half precision, we do not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor

from dumo import __version__, bound
from dumo.data.source import Data, Finite
from dumo.features import inception_weights
from dumo.features.inception import SIZE, WIDTH
from dumo.io.path import user_path
from dumo.protocols import reference
from dumo.protocols.cache import cached
from dumo.protocols.evaluator import Evaluator, Tick, in_turn
from dumo.protocols.image_evaluator import ImageEvaluator
from dumo.protocols.standard import STANDARDS, Name, Standard
from dumo.types import Spec, UserError


class ImageProtocol(Spec):
    """Images in colour, decoded, by the features of Inception."""

    kind: Name
    samples: int | None = Field(default=None, ge=1, le=bound.SAMPLES)  # None: as many as the name says
    frechet: bool = True  # without it, FID and sFID are left out: for sets of 2048 images or fewer
    reference: str | None = Field(default=None)  # ADM's file; None: the run's own data
    weights: str | None = Field(default=None)  # of Inception; None: where $DUMO_INCEPTION says

    @property
    def name(self) -> str:
        """`kind`, with whatever is not as the name says."""
        odd = [] if self.total == self.standard.samples else [f"{self.total} samples"]
        odd += [] if self.frechet else ["no Fréchet distances"]
        return f"{self.kind} ({', '.join(odd)})" if odd else self.kind

    @property
    def standard(self) -> Standard:
        """What the name fixes."""
        return STANDARDS[self.kind]

    @property
    def total(self) -> int:
        """How many samples are judged."""
        return self.samples or self.standard.samples

    @property
    def missing(self) -> str | None:
        """What must be fetched before anything can be judged here; None: nothing."""
        try:
            file = inception_weights.place(self.weights and user_path(self.weights, "evaluate.protocol.weights"))
        except UserError as error:
            return str(error)
        if not file or not file.is_file():
            return "the weights of Inception: dumo data inception says how to get them"
        named = self.reference is not None or not self.standard.url
        return None if named else "ADM's reference, named in evaluate.protocol.reference: see dumo data adm"

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Refuse, with a `UserError` and before any work, images that this protocol does not judge, or too few.

        `shape` is that of a decoded image. Unconditional samples, of 0 classes, may be judged by any protocol.
        """
        size, wanted = self.standard.size, self.standard.classes
        if len(shape) != 3 or shape[0] != 3 or size not in (None, shape[1]) or size not in (None, shape[2]):
            pixels = "any size" if size is None else f"{size}x{size}"
            raise UserError(
                f"protocol {self.kind} judges colour images of {pixels}, not samples of shape {tuple(shape)}:"
                " decode latents first, or choose another protocol"
            )
        if classes and wanted not in (None, classes):
            raise UserError(f"protocol {self.kind} is of {wanted} classes, not {classes}: choose another protocol")
        if self.frechet and self.total <= WIDTH:
            raise UserError(
                f"a Fréchet distance of {WIDTH} features needs more than {WIDTH} samples, here are {self.total}:"
                " give more, or set frechet to false and go by kid"
            )

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """The class of sample i: i mod `classes`, all 0 where there are none."""
        return in_turn(self.total, classes)

    def evaluator(
        self,
        open_data: Callable[[], Data],
        *,
        classes: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        tick: Tick | None = None,
    ) -> Evaluator:
        """Who compares samples with ADM's file where the name says so, else with all images of the data, then opened.

        What the reference comes to is kept for the next time (`dumo.protocols.cache`). With several ranks every one
        asks the same. Raises `UserError` for missing or wrong weights, a file that is not the reference meant, and for
        more or fewer images than the name says.
        """
        standard = self.standard
        extractor = inception_weights.load(
            self.weights and user_path(self.weights, "evaluate.protocol.weights"), device
        )
        if standard.url:
            file = reference.adm_file(self._file(standard.url), self.kind, standard)
            found, make = reference.adm_facts(file), partial(reference.adm_statistics, extractor, file, tick)
        elif isinstance(data := open_data(), Finite):
            found, make = (
                reference.album_facts(data, self.kind, standard),
                partial(reference.album_statistics, extractor, data, tick),
            )
        else:
            raise UserError(f"protocol {self.kind} goes through all images of a data set, and this has none")
        facts = {
            **inception_weights.facts(extractor),
            **found,
            "resize": f"TensorFlow 1, bilinear, to {SIZE}",
            "rounding": "0 to 255",
        }
        real = cached({"protocol": self.kind, "dumo": __version__, **facts}, make)
        return ImageEvaluator(self.kind, standard, self.total, self.frechet, extractor, real, facts, device)

    @model_validator(mode="after")
    def _needs_a_file_or_not(self) -> "ImageProtocol":
        if self.reference and not self.standard.url:
            raise UserError(f"protocol {self.kind} compares with the images of the data: leave out its reference")
        return self

    def _file(self, url: str) -> Path:
        """Where ADM's file is. Raises `UserError` where that is not said."""
        if self.reference is None:
            raise UserError(
                f"protocol {self.kind} compares with ADM's file {url}: fetch it, and set evaluate.protocol.reference"
                " to where it is"
            )
        return user_path(self.reference, "evaluate.protocol.reference")
