"""Captions instead of classes: words around the name of an image's class, or what was written of each image.

`Templates` and `CaptionFiles` are the two specs, `data.captions` of a run. `with_captions` then turns a source whose
classes are rows of captions into a source of captions (`Captioned`). `dumo.data.annotation` reads what was written.

A condition is the number of a caption (`dumo.encoders.caption`), and `classes` counts the captions. Where captions are
made of L classes by S templates, and H more templates that are held out of training,

    caption s of class l has number l S + s,    held caption h of class l has number L S + l H + h.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor

from dumo.encoders.caption import Captions
from dumo.io import digest
from dumo.io.source import Bucketed, DataSource, hashes_of
from dumo.types import Spec, UserError

if TYPE_CHECKING:
    from dumo.io.content import Hashes

BRACED = re.compile(r"\{[^{}]*\}")
PLACEHOLDERS = ("{}", "{n}")  # for the class's name, for its number
CACHED_DATA = 8  # data sets whose captions are cached: ours


class Templates(Spec):
    """Sentences around the name of an image's class, `a photo of a {}`, or around its number, `the digit {n}`.

    In training an image has each caption of its class with equal probability, but none that is held out.
    """

    kind: Literal["templates"] = "templates"
    templates: tuple[str, ...] = Field(min_length=1)
    held: tuple[str, ...] = ()  # never trained on: for evaluation
    names: tuple[str, ...] = ()  # of the classes; (): those of the data

    @model_validator(mode="after")
    def _name_a_class(self) -> "Templates":
        for template in (*self.templates, *self.held):
            braced = set(BRACED.findall(template))
            if not braced or not braced <= set(PLACEHOLDERS):
                raise UserError(
                    f"template '{template}' must hold {{}} where the class's name goes, or {{n}} for its number, and "
                    "no other braces"
                )
        return self

    def class_names(self, names: Sequence[str]) -> Sequence[str]:
        """The names of the classes in captions; `names` are those of the data, () where they have none.

        Raises UserError where there are none at all, or the spec has another number of names than the data.
        """
        if not self.names and not names:
            raise UserError("the classes of these data have numbers only: give captions.names, one to each")
        if self.names and names and len(names) != len(self.names):
            raise UserError(f"captions.names has {len(self.names)} names for {len(names)} classes: give one to each")
        return self.names or names

    def of(self, names: Sequence[str]) -> Captions:
        """All captions, those held out last; row l has the captions of class l that are trained on.

        `names` are those of the data's classes. Raises UserError as `class_names`, and where two captions are equal, or
        one is blank.
        """
        names = self.class_names(names)
        trained = [_fill(template, name, k) for k, name in enumerate(names) for template in self.templates]
        held = [_fill(template, name, k) for k, name in enumerate(names) for template in self.held]
        texts = tuple(text.strip() for text in (*trained, *held))
        for text, count in Counter(texts).items():
            if not text or count > 1:
                what = f"the caption '{text}' twice" if text else "a caption of nothing but blanks"
                raise UserError(f"captions.templates and the names of the classes make {what}: change one of them")
        ends = len(self.templates) * torch.arange(1, len(names) + 1)
        return Captions(texts, torch.arange(len(trained)), ends)

    def count(self, labels: int) -> int:
        """The number of captions of `labels` classes, held out or not."""
        return labels * (len(self.templates) + len(self.held))

    def numbers(self, labels: Int64[Tensor, " n"], classes: int, *, held: bool = False) -> Int64[Tensor, " n"]:
        """A caption's number (n,) for each label (n,): each class takes its captions in turn.

        `classes` is the number of classes. `held`: captions that are held out; False: those that are trained on. Raises
        UserError where no template is held out.
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
    """What was written of each image, next to it or in its table. Each caption of an image is drawn equally often."""

    kind: Literal["files"] = "files"
    # The columns or keys of captions, by commas; txt, caption: files; auto: the first of CAPTION_NAMES there is.
    name: str = "auto"
    # The column of the image that each caption edits, of a model that edits; None: it reads texts alone.
    source: str | None = Field(default=None, exclude_if=lambda source: source is None)
    digest: str | None = None  # of the texts in order, found when the run is made

    def require(self, captions: Captions, where: str) -> None:
        """Raise UserError for captions of another digest, found at `where`."""
        digest_now = captions.digest()
        if self.digest not in (None, digest_now):
            raise UserError(
                f"{where} has other captions than the run was made with (digest {digest_now}, captions.digest says "
                f"{self.digest}): put them back as they were, or begin a new run"
            )


Captioning = Annotated[Templates | CaptionFiles, Field(discriminator="kind")]


def _fill(template: str, name: str, number: int) -> str:
    """The caption of a class with a name and a number."""
    return BRACED.sub(lambda placeholder: name if placeholder[0] == "{}" else str(number), template)


@lru_cache(CACHED_DATA)
def cached_captions(data: Any) -> Captions:  # noqa: ANN401, the frozen spec of data that have captions
    """The captions of some data, read once in this process."""
    return data.all_captions()


@dataclass(frozen=True)
class Captioned:
    """A source whose classes are rows of `captions`: numbers of images, or of classes."""

    source: DataSource
    captions: Captions

    @property
    def size(self) -> int | None:
        """The number of samples."""
        return self.source.size

    @property
    def hashes(self) -> "Hashes | None":
        """The hashes of the images; None for a source whose samples are no files."""
        return hashes_of(self.source)

    @property
    def origin(self) -> object:
        """The images that latents were made of; None for other sources."""
        return getattr(self.source, "origin", None)

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The source's samples, each with one of its captions, drawn by the step and the place in the batch."""
        x, row = self.source.batch(step, batch, seed, rows)
        return x, self.captions.draw(row, seed, step, batch=batch, rows=rows)

    def numbers(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """The numbers of the source's samples, (b,)."""
        return self.source.numbers(step, batch, seed, rows)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """The source's reference, each sample with its first caption."""
        x, row = self.source.reference(n, seed, i)
        return x, self.captions.first_of(row)

    def fingerprint(self) -> str | None:
        """A digest of the samples, the texts, and their numbers by sample; None where samples never end."""
        of_samples = self.source.fingerprint()
        if not of_samples:
            return of_samples
        captions = self.captions
        parts = (captions.digest(), digest.of_tensor(captions.ids), digest.of_tensor(captions.ends))
        return digest.short(of_samples, *parts)


def with_captions(source: DataSource | Bucketed, captions: Captions) -> Captioned | Bucketed:
    """A source of captions, out of one whose classes are rows of `captions`, in buckets or not."""
    if isinstance(source, Bucketed):
        return replace(source, parts=[Captioned(part, captions) for part in source.parts])
    return Captioned(source, captions)
