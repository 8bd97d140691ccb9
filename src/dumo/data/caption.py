"""Captions instead of classes: words around the name of an image's class, or what was written of each image.

A condition is then the number of a caption (`dumo.encoders.caption`), and `classes` counts the captions. Where they
are made of L classes by S templates, and H more that are held out of training,

    caption s of class l has number l S + s,    held caption h of class l has number L S + l H + h.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor

from dumo.encoders.caption import Captions
from dumo.io import digest
from dumo.io.content import Hashes, hashes_of
from dumo.io.source import Bucketed, DataSource
from dumo.types import Spec, UserError

BRACED = re.compile(r"\{[^{}]*\}")
PLACES = ("{}", "{n}")  # for the class's name, for its number
KEPT = 8  # data sets whose captions are kept: ours


class Templates(Spec):
    """Sentences around the name of an image's class, `a photo of a {}`, or around its number, `the digit {n}`.

    In training an image has each of those of its class with equal probability, and none that is held out.
    """

    kind: Literal["templates"] = "templates"
    templates: tuple[str, ...] = Field(min_length=1)
    held: tuple[str, ...] = ()  # never trained on: for evaluation
    names: tuple[str, ...] = ()  # of the classes; (): those of the data

    @model_validator(mode="after")
    def _name_a_class(self) -> "Templates":
        for template in (*self.templates, *self.held):
            found = BRACED.findall(template)
            if not found or not set(found) <= set(PLACES):
                raise UserError(
                    f"template '{template}' must hold {{}} where the class's name goes, or {{n}} for its number, and "
                    "no other braces"
                )
        return self

    def class_names(self, names: Sequence[str]) -> Sequence[str]:
        """The names of the classes, given those of the data. Raises UserError where there are none, or others."""
        if self.names and names and len(names) != len(self.names):
            wrong = f"captions.names has {len(self.names)} names for {len(names)} classes: give one to each"
        elif not self.names and not names:
            wrong = "the classes of these data have numbers only: give captions.names, one to each"
        else:
            return self.names or names
        raise UserError(wrong)

    def of(self, names: Sequence[str]) -> Captions:
        """All captions, held ones last; row l is of class l.

        `names` are the data's own. Raises UserError as `class_names`, and where two captions are alike or one is blank.
        """
        names = self.class_names(names)
        seen = [_filled(template, name, k) for k, name in enumerate(names) for template in self.templates]
        held = [_filled(template, name, k) for k, name in enumerate(names) for template in self.held]
        texts = tuple(text.strip() for text in (*seen, *held))
        for text, count in Counter(texts).items():
            if not text or count > 1:
                what = f"the caption '{text}' twice" if text else "a caption of nothing but blanks"
                raise UserError(f"captions.templates and the names of the classes make {what}: change one of them")
        ends = len(self.templates) * torch.arange(1, len(names) + 1)
        return Captions(texts, torch.arange(len(seen)), ends)

    def count(self, labels: int) -> int:
        """How many captions `labels` classes have."""
        return labels * (len(self.templates) + len(self.held))

    def numbers(self, labels: Int64[Tensor, " n"], classes: int, *, held: bool = False) -> Int64[Tensor, " n"]:
        """A caption for each label: those of its class in turn, of the trained ones, or of those that are held out.

        Raises UserError where none are.
        """
        many = len(self.held if held else self.templates)
        if not many:
            raise UserError("captions.held names no template that is held out: name some, or ask for the seen ones")
        order = labels.argsort(stable=True)  # the samples of a class side by side
        first = labels.bincount(minlength=classes).cumsum(0) - labels.bincount(minlength=classes)
        turn = torch.empty_like(labels)
        turn[order] = torch.arange(len(labels)) - first[labels[order]]
        return classes * len(self.templates) * held + labels * many + turn % many


class CaptionFiles(Spec):
    """What was written of each image, next to it or in its table; of several captions one is drawn, evenly."""

    kind: Literal["files"] = "files"
    # The columns or keys that captions stand under, by commas; txt, caption: files; auto: the first of CAPTION_NAMES.
    name: str = "auto"
    # The column of the image that each caption edits, of a model that edits; None: it reads texts alone.
    source: str | None = Field(default=None, exclude_if=lambda source: source is None)
    digest: str | None = None  # of the texts in order, found when the run is made

    def require(self, found: Captions, where: str) -> None:
        """Raise UserError for other texts than those of the digest."""
        if self.digest not in (None, found.digest()):
            raise UserError(
                f"{where} has other captions than the run was made with (digest {found.digest()}, captions.digest says "
                f"{self.digest}): put them back as they were, or begin a new run"
            )


Captioning = Annotated[Templates | CaptionFiles, Field(discriminator="kind")]


def _filled(template: str, name: str, number: int) -> str:
    """The caption of a class."""
    return BRACED.sub(lambda place: name if place[0] == "{}" else str(number), template)


@lru_cache(KEPT)
def kept(data: Any) -> Captions:  # noqa: ANN401, the frozen spec of data that have captions
    """The captions of some data, found once."""
    return data.all_captions()


@dataclass(frozen=True)
class Captioned:
    """A source whose classes are rows of `captions`: numbers of images, or of classes."""

    of: DataSource
    captions: Captions

    @property
    def size(self) -> int | None:
        """The number of samples."""
        return self.of.size

    @property
    def hashes(self) -> Hashes | None:
        """Of the images."""
        return hashes_of(self.of)

    @property
    def origin(self) -> object:
        """Of latents."""
        return getattr(self.of, "origin", None)

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Its samples, each with one of its captions, keyed by the step and the place in the batch."""
        x, row = self.of.batch(step, batch, seed, rows)
        return x, self.captions.drawn(row, seed, step, batch=batch, rows=rows)

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """As its own."""
        return self.of.numbers(step, batch, seed, rows)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Its own, each with its first caption."""
        x, row = self.of.reference(n, seed, i)
        return x, self.captions.first(row)

    def fingerprint(self) -> str | None:
        """Of the samples, the texts, and their numbers by sample."""
        captions = self.captions
        parts = (captions.digest(), digest.of_tensor(captions.ids), digest.of_tensor(captions.ends))
        return (own := self.of.fingerprint()) and digest.short(own, *parts)


def captioned(source: DataSource | Bucketed, captions: Captions) -> Captioned | Bucketed:
    """A source of rows of captions as one of captions, in buckets or not."""
    if isinstance(source, Bucketed):
        return replace(source, parts=[Captioned(part, captions) for part in source.parts])
    return Captioned(source, captions)
