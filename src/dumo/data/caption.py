"""Captions in place of classes: a template filled with the name of an image's class, or what was written of the image.

The order of events, for data with `captions`:

1. `Templates` and `CaptionFiles` are the specs, `data.captions` of a run.
2. The data make their `Captions` (`dumo.encoders.caption`): `Templates.all_captions` of the names of the classes, or
   `dumo.data.annotation` of what was written. `cached_captions` keeps them for this process.
3. `with_captions` wraps the source. A source with captions gives, for each image, its class (templates) or its number
   (files). `Captioned` puts a caption of that row in its place.

A condition is the number of a caption, and `data.classes` counts the captions. With L classes, S templates that are
trained on, and H more that are held out of training,

    caption s of class l has the number                     l S + s
    held-out caption h of class l has the number      L S + l H + h
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
from dumo.io.content import Hashes
from dumo.io.source import Bucketed, DataSource, OriginCheck, hashes_of, origin_of
from dumo.types import Spec, UserError

_BRACED = re.compile(r"\{[^{}]*\}")
_NAME_PLACEHOLDER = "{}"  # in a template, for the name of the class
_NUMBER_PLACEHOLDER = "{n}"  # in a template, for the number of the class
_MAX_CACHED = 8  # data sets whose captions are cached: ours


class Templates(Spec):
    """Sentences around the name of an image's class, `a photo of a {}`, or around its number, `the digit {n}`.

    In training an image has each caption of its class with equal probability, but none that is held out.
    """

    kind: Literal["templates"] = "templates"
    templates: tuple[str, ...] = Field(min_length=1)
    held: tuple[str, ...] = ()  # templates held out of training, for evaluation
    names: tuple[str, ...] = ()  # of the classes; (): those of the data

    @model_validator(mode="after")
    def _require_placeholders(self) -> "Templates":
        """Raise UserError for a template without a placeholder, or with other braces."""
        for template in (*self.templates, *self.held):
            braced = set(_BRACED.findall(template))
            if not braced or not braced <= {_NAME_PLACEHOLDER, _NUMBER_PLACEHOLDER}:
                raise UserError(
                    f"template '{template}' must hold {{}} where the class's name goes, or {{n}} for its number, and "
                    "no other braces"
                )
        return self

    def all_captions(self, data_names: Sequence[str]) -> Captions:
        """All captions, those held out last; row l has the captions of class l that are trained on.

        `data_names` are the names of the data's classes, () where they have none. Raises UserError where the classes
        have no names, here or in the spec, or where the two are of different lengths; and where two captions are equal,
        or one is blank.
        """
        class_names = self._class_names(data_names)
        trained = _fill_templates(self.templates, class_names)
        held_out = _fill_templates(self.held, class_names)
        texts = (*trained, *held_out)
        for text, count in Counter(texts).items():
            if not text or count > 1:
                what = f"the caption '{text}' twice" if text else "a caption of nothing but blanks"
                raise UserError(f"captions.templates and the names of the classes make {what}: change one of them")
        ends = len(self.templates) * torch.arange(1, len(class_names) + 1)
        return Captions(texts, torch.arange(len(trained)), ends)

    def _class_names(self, data_names: Sequence[str]) -> Sequence[str]:
        """The names of the classes in captions: the spec's, else `data_names`. Raises UserError for none, or few."""
        if not self.names and not data_names:
            raise UserError("the classes of these data have numbers only: give captions.names, one to each")
        if self.names and data_names and len(data_names) != len(self.names):
            raise UserError(
                f"captions.names has {len(self.names)} names for {len(data_names)} classes: give one to each"
            )
        return self.names or data_names

    def num_captions(self, num_classes: int) -> int:
        """The number of captions of `num_classes` classes, held out or not."""
        return num_classes * (len(self.templates) + len(self.held))

    def captions_in_turn(
        self, labels: Int64[Tensor, " n"], num_classes: int, *, held_out: bool = False
    ) -> Int64[Tensor, " n"]:
        """A caption's number (n,) for the class (n,) of each sample: each class takes its captions in turn.

        `num_classes` is that of the data. `held_out`: take captions that are held out; False: those that are trained
        on. Raises UserError where no template is held out.
        """
        captions_per_class = len(self.held if held_out else self.templates)
        if not captions_per_class:
            raise UserError("captions.held names no template that is held out: name some, or ask for the seen ones")
        # how many samples of its class come before each sample
        order = labels.argsort(stable=True)  # the samples of a class side by side
        class_counts = labels.bincount(minlength=num_classes)
        class_starts = class_counts.cumsum(0) - class_counts
        place_in_class = torch.empty_like(labels)
        place_in_class[order] = torch.arange(len(labels)) - class_starts[labels[order]]

        first_number = num_classes * len(self.templates) if held_out else 0
        return first_number + labels * captions_per_class + place_in_class % captions_per_class


class CaptionFiles(Spec):
    """What was written of each image, next to it or in its table. Each caption of an image is drawn equally often."""

    kind: Literal["files"] = "files"
    # The columns or keys of captions, by commas; txt, caption: files of text; auto: the first column of
    # `dumo.data.column.CAPTION_NAMES` that the table has.
    name: str = "auto"
    # The column of the image that each caption edits, of a model that edits; None: it reads texts alone.
    source: str | None = Field(default=None, exclude_if=lambda source: source is None)
    digest: str | None = None  # of the texts in order, found when the run is made

    def require(self, captions: Captions, where: str) -> None:
        """Raise UserError if the captions read from `where` have another digest than the run's, if it has one."""
        digest_now = captions.digest()
        if self.digest not in (None, digest_now):
            raise UserError(
                f"{where} has other captions than the run was made with (digest {digest_now}, captions.digest says "
                f"{self.digest}): put them back as they were, or begin a new run"
            )


Captioning = Annotated[Templates | CaptionFiles, Field(discriminator="kind")]


def _fill_templates(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """The captions that templates make, class by class, without blanks around them."""
    captions: list[str] = []
    for number, name in enumerate(class_names):
        for template in templates:
            captions.append(_fill(template, name, number).strip())
    return captions


def _fill(template: str, name: str, number: int) -> str:
    """The caption of a class with a name and a number."""
    # in one pass, for a name may hold braces itself
    return _BRACED.sub(lambda match: name if match[0] == _NAME_PLACEHOLDER else str(number), template)


@lru_cache(_MAX_CACHED)
def cached_captions(data: Any) -> Captions:  # noqa: ANN401, the frozen spec of data that have captions
    """What `data.all_captions()` returns, read once in this process."""
    return data.all_captions()


@dataclass(frozen=True)
class Captioned:
    """A source that gives a caption with each sample. Make it by `with_captions`."""

    source: DataSource  # gives a row of `captions` with each sample: the number of its image, or of its class
    captions: Captions

    @property
    def size(self) -> int | None:
        """The number of samples."""
        return self.source.size

    @property
    def hashes(self) -> Hashes | None:
        """The hashes of the images; None for a source whose samples are no files."""
        return hashes_of(self.source)

    @property
    def origin(self) -> OriginCheck | None:
        """The images that latents were made of; None for other sources."""
        return origin_of(self.source)

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The source's samples, each with the number (b,) of one of its captions.

        The caption is drawn by the seed, the step and the place in the batch.
        """
        x, caption_row = self.source.batch(step, batch_size, seed, rows)
        return x, self.captions.draw(caption_row, seed, step, batch=batch_size, rows=rows)

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """The numbers of the source's samples, (b,)."""
        return self.source.numbers(step, batch_size, seed, rows)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """The source's reference, each sample with the number of its first caption."""
        x, caption_row = self.source.reference(n, seed, i)
        return x, self.captions.first_of(caption_row)

    def fingerprint(self) -> str | None:
        """A digest of the samples, the texts, and their numbers by sample; None where samples never end."""
        samples_fingerprint = self.source.fingerprint()
        if not samples_fingerprint:
            return samples_fingerprint
        captions = self.captions
        return digest.short(
            samples_fingerprint, captions.digest(), digest.of_tensor(captions.ids), digest.of_tensor(captions.ends)
        )


def with_captions(source: DataSource | Bucketed, captions: Captions) -> Captioned | Bucketed:
    """The source with captions. It must give rows of `captions` as its classes; it may be in buckets."""
    if isinstance(source, Bucketed):
        return replace(source, parts=[Captioned(part, captions) for part in source.parts])
    return Captioned(source, captions)
