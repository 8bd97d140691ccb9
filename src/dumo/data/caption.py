"""Captions as conditions: templates filled with the name of an image's class, or captions in files.

For data with `captions`:

1. `Templates` and `CaptionFiles` are the specs, `data.captions` in a run.
2. The data set makes its `Captions` (`dumo.encoders.caption_ids`): `Templates.all_captions` from class names, or
   `captions_of` from columns and text files. `cached_captions` caches them in this process.
3. `with_captions` wraps the source, whose labels are then classes (templates) or image numbers (files). `Captioned`
   replaces each label by a caption.

A condition is the number of a caption, and `data.classes` is the number of captions. With L classes, S templates used
in training, and H held-out templates,

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

# The default of captions.name.
AUTO = "auto"
_BRACED = re.compile(r"\{[^{}]*\}")
# Placeholders for the name and the number of the class.
_NAME_PLACEHOLDER = "{}"
_NUMBER_PLACEHOLDER = "{n}"
# The number of data sets whose captions are cached.
_MAX_CACHED = 8


class Templates(Spec):
    """Sentences with the name of an image's class, `a photo of a {}`, or with its number, `the digit {n}`.

    In training, one of the class's captions that are not held out is drawn uniformly.
    """

    kind: Literal["templates"] = "templates"
    templates: tuple[str, ...] = Field(min_length=1)
    # Templates held out of training, for evaluation.
    held: tuple[str, ...] = ()
    # The names of the classes. () means the names in the data.
    names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _require_placeholders(self) -> "Templates":
        """Raise UserError if a template has no placeholder, or other braces."""
        for template in (*self.templates, *self.held):
            braced = set(_BRACED.findall(template))
            if not braced or not braced <= {_NAME_PLACEHOLDER, _NUMBER_PLACEHOLDER}:
                raise UserError(
                    f"template '{template}' must contain {{}} for the class's name, or {{n}} for its number, and no "
                    "other braces"
                )
        return self

    def all_captions(self, data_names: Sequence[str]) -> Captions:
        """Return all captions, held-out ones last; row l has the training captions of class l.

        `data_names` are the names of the data's classes, or (). Raises UserError if neither the data nor the spec have
        names, if their numbers differ, if two captions are equal, or if one is blank.
        """
        class_names = self._class_names(data_names)
        trained = _fill_templates(self.templates, class_names)
        held_out = _fill_templates(self.held, class_names)
        texts = (*trained, *held_out)
        for text, count in Counter(texts).items():
            if not text or count > 1:
                what = f"the caption '{text}' twice" if text else "a blank caption"
                raise UserError(f"captions.templates and the class names produce {what}: change one of them")
        ends = len(self.templates) * torch.arange(1, len(class_names) + 1)
        return Captions(texts, torch.arange(len(trained)), ends)

    def _class_names(self, data_names: Sequence[str]) -> Sequence[str]:
        """Return the class names in captions. Raises UserError if there are none, or if their numbers differ."""
        if not self.names and not data_names:
            raise UserError("the classes of this data have no names: set captions.names to one name for each class")
        if self.names and data_names and len(data_names) != len(self.names):
            raise UserError(
                f"captions.names has {len(self.names)} names for {len(data_names)} classes: give one for each class"
            )
        return self.names or data_names

    def num_captions(self, num_classes: int) -> int:
        """Return the number of captions for `num_classes` classes, including held-out ones."""
        return num_classes * (len(self.templates) + len(self.held))

    def captions_in_turn(
        self, labels: Int64[Tensor, " n"], num_classes: int, *, held_out: bool = False
    ) -> Int64[Tensor, " n"]:
        """Return a caption number (n,) for the class (n,) of each sample, cycling through the class's captions.

        num_classes: the number of classes of the data.
        held_out: use held-out captions instead of training captions.

        Raises UserError if no template is held out.
        """
        captions_per_class = len(self.held if held_out else self.templates)
        if not captions_per_class:
            raise UserError("captions.held has no templates: add some, or use training captions")
        # Count the earlier samples of the same class. Sorting puts samples of a class next to each other.
        order = labels.argsort(stable=True)
        class_counts = labels.bincount(minlength=num_classes)
        class_starts = class_counts.cumsum(0) - class_counts
        place_in_class = torch.empty_like(labels)
        place_in_class[order] = torch.arange(len(labels)) - class_starts[labels[order]]

        first_number = num_classes * len(self.templates) if held_out else 0
        return first_number + labels * captions_per_class + place_in_class % captions_per_class


class CaptionFiles(Spec):
    """Captions in text files next to images, or in tables. One of an image's captions is drawn uniformly."""

    kind: Literal["files"] = "files"
    # The columns or keys of captions, separated by commas. txt and caption mean text files; auto means the first of
    # `dumo.data.rows.CAPTION_COLUMNS` that is not blank, in each row.
    name: str = "auto"
    # For models that edit images, the column of the image that each caption edits.
    source: str | None = Field(default=None, exclude_if=lambda source: source is None)
    # The digest of the texts in order, set when the run is created.
    digest: str | None = None

    def require(self, captions: Captions, where: str) -> None:
        """Raise UserError if the captions read from `where` do not have the run's digest, if it has one."""
        digest_now = captions.digest()
        if self.digest not in (None, digest_now):
            raise UserError(
                f"{where} has different captions than the run (digest {digest_now}, captions.digest is "
                f"{self.digest}): restore them, or start a new run"
            )


Captioning = Annotated[Templates | CaptionFiles, Field(discriminator="kind")]


def _fill_templates(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Return the captions of templates, class by class, without surrounding blanks."""
    captions: list[str] = []
    for number, name in enumerate(class_names):
        for template in templates:
            captions.append(_fill(template, name, number).strip())
    return captions


def _fill(template: str, name: str, number: int) -> str:
    """Fill a template with the name and number of a class."""
    # Substitute in one pass, since a name may contain braces.
    return _BRACED.sub(lambda match: name if match[0] == _NAME_PLACEHOLDER else str(number), template)


class NoCaptionsError(UserError):
    """The images have no captions."""


def captions_of(rows: Rows, name: str, source: str | None = None, *, is_new: bool) -> list[tuple[str, ...]]:
    """Read the captions of each image, in order; () for an image without captions.

    name, source: the fields of `CaptionFiles`.
    is_new: warn about images without a caption, and refuse many of them. Pass False for existing runs, whose captions
        are compared by digest.

    Raises NoCaptionsError if no image has a caption, and UserError if a column is missing or a caption is not a text.
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

    # None means no caption was found. A blank caption means that the image deliberately has none.
    captions: list[tuple[str, ...] | None] = [None] * len(rows)
    for column in columns:
        for i, value in enumerate(rows.column(column)):
            before = captions[i]
            is_found = name == AUTO and any(text.strip() for text in before or ())
            if is_found or (value is None and rows.has_caption_files):
                continue
            texts = _texts_of(value, f"{rows.path(i)}: {column}")
            captions[i] = texts or before or () if name == AUTO else (*(before or ()), *texts)

    if not any(text.strip() for texts in captions for text in texts or ()):
        hint = f"; it has the columns {', '.join(rows.columns())}" if rows.columns() else ""
        raise NoCaptionsError(
            f"no captions found for the {len(rows)} images of {rows.root}: looked for {', '.join(columns) or 'columns'}"
            f"{hint}; set captions.name, or remove data.captions"
        )
    if is_new:
        uncaptioned = [rows.names[i] for i, texts in enumerate(captions) if texts is None]
        require_paired(rows.root, "images have no caption, nor a blank one", uncaptioned, len(rows))
    return [texts or () for texts in captions]


def edited_images(rows: Rows, source: str) -> list[list[tuple[dict[str, Any], Path]]]:
    """Return, for each image, its table rows with the path of the original image in the column `source`.

    Raises UserError if an image has no such row.
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
                "data.root a row with the path of the original image, outside data.root"
            )
        edits_by_image.append(edits)
    return edits_by_image


def image_hash(file: Path) -> str:
    """Compute the SHA-256 of an original image, cached until the file changes. Raises UserError if it is missing."""
    if not file.is_file():
        raise UserError(f"{file} is missing: restore this image to edit, or change captions.source")
    file_stat = file.stat()
    return _hash_of_state(file, file_stat.st_mtime_ns, file_stat.st_size)


@lru_cache(None)
def _hash_of_state(file: Path, time: int, size: int) -> str:
    """Compute the SHA-256 of a file. Its modification time and size are part of the cache key."""
    return digest.of_file(file)


def _edits_of(rows: Rows, name: str, source: str) -> list[tuple[str, ...]]:
    """Return the captions of each image with the hash of the original image. Raises UserError if there are none."""
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
            raise UserError(f"{rows.path(i)} has no text that describes the edit: set captions.name")
        captions.append(tuple(of_image))
    return captions


def _texts_of(value: Any, where: str) -> tuple[str, ...]:  # noqa: ANN401, a value of a table
    """Return the captions in a value, a text or a list of texts. Raises UserError for other values."""
    texts = value if isinstance(value, list) else [value] if value is not None else []
    for text in texts:
        if not isinstance(text, str) or not is_unicode(text):
            raise UserError(f"{where} has {brief(ascii(text))}, which is not a text: set captions.name")
    return tuple(texts)


def _existing_path(path: str) -> Path:
    """Return the path in the Unicode form (unchanged, NFC or NFD) in which a file exists; unchanged if none does."""
    for form in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
        if os.path.exists(form):
            return Path(form)
    return Path(path)


@lru_cache(_MAX_CACHED)
def cached_captions(data: Any) -> Captions:  # noqa: ANN401, the frozen spec of data that have captions
    """Return `data.all_captions()`, cached in this process."""
    return data.all_captions()


@dataclass(frozen=True)
class Captioned:
    """A source whose conditions are captions, made by `with_captions`.

    source: has a row of `captions` as the label of each sample: the number of its image or class.
    """

    source: DataSource
    captions: Captions

    @property
    def size(self) -> int | None:
        """The number of samples."""
        return self.source.size

    @property
    def ledger(self) -> object:
        """The ledger of the images; None if samples are not files."""
        return getattr(self.source, "ledger", None)

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the source's samples, each with the number (b,) of one of its captions.

        The draw of the caption is keyed by seed, step and position in the batch.
        """
        x, caption_row = self.source.batch(step, batch_size, seed, rows)
        return x, self.captions.draw(caption_row, seed, step, batch=batch_size, rows=rows)

    def numbers(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Int64[Tensor, " b"] | None:
        """Return the numbers of the source's samples, (b,)."""
        return self.source.numbers(step, batch_size, seed, rows)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        """Return the source's reference, each sample with the number of its first caption."""
        x, caption_row = self.source.reference(n, seed, i)
        return x, self.captions.first_of(caption_row)

    def fingerprint(self) -> str | None:
        """Return a digest of the samples, the texts, and their numbers by sample; None for infinite data."""
        samples_fingerprint = self.source.fingerprint()
        if not samples_fingerprint:
            return samples_fingerprint
        captions = self.captions
        return digest.short(
            samples_fingerprint, captions.digest(), digest.of_tensor(captions.ids), digest.of_tensor(captions.ends)
        )


def with_captions(source: DataSource | Bucketed, captions: Captions) -> Captioned | Bucketed:
    """Wrap a source with captions. Its labels must be rows of `captions`. It may have buckets."""
    if isinstance(source, Bucketed):
        return replace(source, parts=[Captioned(part, captions) for part in source.parts])
    return Captioned(source, captions)
