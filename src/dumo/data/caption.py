"""Captions in place of classes: a template filled with the name of an image's class, or what was written of the image.

The order of events, for data with `captions`:

1. `Templates` and `CaptionFiles` are the specs, `data.captions` of a run.
2. The data make their `Captions` (`dumo.encoders.caption_ids`): `Templates.all_captions` of the names of the classes,
   or `captions_of` the columns and text files of the images. `cached_captions` keeps them for this process.
3. `with_captions` wraps the source. A source with captions gives, for each image, its class (templates) or its number
   (files). `Captioned` puts a caption of that row in its place.

A condition is the number of a caption, and `data.classes` counts the captions. With L classes, S templates that are
trained on, and H more that are held out of training,

    caption s of class l has the number                     l S + s
    held-out caption h of class l has the number      L S + l H + h
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor

from dumo.data.rows import CAPTION_COLUMNS, CAPTION_ENDINGS, TABLES, FolderRows, Rows, require_paired
from dumo.encoders.caption_ids import Captions, edit_caption
from dumo.io import digest
from dumo.io.data_source import Bucketed, DataSource
from dumo.io.read import brief, is_unicode
from dumo.types import Spec, UserError

AUTO = "auto"  # a value of captions.name
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
    # The columns or keys of captions, by commas; txt, caption: files of text; auto: in each row, the first of
    # `dumo.data.rows.CAPTION_COLUMNS` that is not blank.
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


class NoCaptionsError(UserError):
    """The images have no captions."""


def captions_of(rows: Rows, name: str, source: str | None = None, *, is_new: bool) -> list[tuple[str, ...]]:
    """The captions of each image, in order; () of an image that has none.

    - `name`: as `CaptionFiles.name`
    - `source`: the column of the image that each caption edits; None: captions are texts alone
    - `is_new`: warn of images without a caption, and refuse many of them. False for a run that has begun, whose digest
      says what its captions are.

    Raises NoCaptionsError where no image has a caption; UserError for a missing column, and a caption that is no text.
    """
    if source:
        return _edits_of(rows, name, source)
    if name == AUTO:
        columns = rows.caption_columns()
    else:
        columns = name.split(",")
        available = [*rows.columns(), *(CAPTION_ENDINGS if isinstance(rows, FolderRows) else ())]
        for column in columns:
            if column not in available:
                raise UserError(
                    f"{rows.root} has no '{brief(column)}' (it has {', '.join(available)}): set captions.name"
                )

    # None: nothing is written of an image. A blank caption says that it shall have none.
    captions: list[tuple[str, ...] | None] = [None] * len(rows)
    for column in columns:
        for i, value in enumerate(rows.column(column)):
            before = captions[i]
            is_found = name == AUTO and any(text.strip() for text in before or ())
            if is_found or (value is None and rows.captions_lie_apart):
                continue
            texts = _texts_of(value, f"{rows.path(i)}: {column}")
            captions[i] = texts or before or () if name == AUTO else (*(before or ()), *texts)

    if not any(text.strip() for texts in captions for text in texts or ()):
        hint = f"; it has the columns {', '.join(rows.columns())}" if rows.columns() else ""
        raise NoCaptionsError(
            f"no captions found for the {len(rows)} images of {rows.root}: looked for {', '.join(columns) or 'columns'}"
            f"{hint}; set captions.name, or leave out data.captions"
        )
    if is_new:
        uncaptioned = [rows.names[i] for i, texts in enumerate(captions) if texts is None]
        require_paired(rows.root, "images have no caption, nor a blank one", uncaptioned, len(rows))
    return [texts or () for texts in captions]


def edited_images(rows: Rows, source: str) -> list[list[tuple[dict[str, Any], Path]]]:
    """For each image, the rows of tables that name an image it was edited from, in the column `source`, with its path.

    Raises UserError for an image without such a row.
    """
    edits_by_image: list[list[tuple[dict[str, Any], Path]]] = []
    for i, table_rows in enumerate(rows.table_rows if isinstance(rows, FolderRows) else [[]] * len(rows)):
        edits: list[tuple[dict[str, Any], Path]] = []
        for row in table_rows:
            place = row.values.get(source)
            if isinstance(place, str):
                edits.append((row.values, _existing_path(os.path.normpath(os.path.join(row.folder, place)))))
        if not edits:
            raise UserError(
                f"{rows.path(i)} has no row with '{brief(source)}' in {' or '.join(TABLES)}: give each image in "
                "data.root a row that names the image it was edited from; keep those outside data.root"
            )
        edits_by_image.append(edits)
    return edits_by_image


def image_hash(file: Path) -> str:
    """The SHA-256 of an image that is edited, taken again where it has changed. Raises UserError if it is missing."""
    if not file.is_file():
        raise UserError(f"{file} is missing, an image to edit: put it there, or change captions.source")
    file_stat = file.stat()
    return _hash_of_state(file, file_stat.st_mtime_ns, file_stat.st_size)


@lru_cache(None)
def _hash_of_state(file: Path, time: int, size: int) -> str:
    """The SHA-256 of a file that was last changed at a time, in ns, and has a size in bytes."""
    return digest.of_file(file)


def _edits_of(rows: Rows, name: str, source: str) -> list[tuple[str, ...]]:
    """The captions of each image, each with the hash of the image that it edits. Raises UserError if there is none."""
    names = CAPTION_COLUMNS if name == AUTO else tuple(name.split(","))
    captions: list[tuple[str, ...]] = []
    for i, edits in enumerate(edited_images(rows, source)):
        of_image: list[str] = []
        for values, file in edits:
            columns = [column for column in names if values.get(column)]
            for column in columns[:1] if name == AUTO else columns:
                texts = _texts_of(values[column], f"{rows.path(i)}: {column}")
                of_image += [edit_caption(text, image_hash(file)) for text in texts if text.strip()]
        if not of_image:
            raise UserError(f"{rows.path(i)} has no text that says how it was edited: set captions.name")
        captions.append(tuple(of_image))
    return captions


def _texts_of(value: Any, where: str) -> tuple[str, ...]:  # noqa: ANN401, a value of a table
    """The captions in a value: a text, or a list of texts. Raises UserError for anything else."""
    texts = value if isinstance(value, list) else [value] if value is not None else []
    for text in texts:
        if not isinstance(text, str) or not is_unicode(text):
            raise UserError(f"{where} holds {brief(ascii(text))}, which is no text: set captions.name")
    return tuple(texts)


def _existing_path(path: str) -> Path:
    """A path in the form of Unicode, as given or C or D, in which a file exists; as given where none does."""
    for form in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
        if os.path.exists(form):
            return Path(form)
    return Path(path)


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
    def ledger(self) -> object:
        """The ledger of the images; None for a source whose samples are no files."""
        return getattr(self.source, "ledger", None)

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
