"""Which columns of a table, or keys of a JSON object, captions stand in, and the captions in a row.

`caption_columns` chooses the columns for `captions.name`, once for a table or an archive. `CaptionColumns.of_row` and
`of_rows` then read the captions of an image:

    name=text,long    all captions in the columns `text` and `long` of a row
    name=auto         in each row, those in the first of CAPTION_NAMES that is not blank there

A value is one text, a list of texts, or missing. Texts stay as they are written.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from dumo.data.pairing import ImageCaptions
from dumo.io.read import brief, is_text_list, is_unicode
from dumo.types import UserError

AUTO = "auto"  # a value of captions.name
CAPTION_NAMES = ("text", "caption", "captions", "prompt")  # columns that `auto` reads: the hub's, webdataset's and ours
TEXT_ENDINGS = ("txt", "caption")  # values of captions.name for files of text. kohya's trainers write the second
CAPTION_FIX = "mend it, or set captions.name"  # the end of messages


@dataclass(frozen=True)
class TableRow:
    """A row of a table, without the name of its image; or an object of JSON."""

    where: str  # the file and the line, for a message
    values: dict[str, Any]  # by column


@dataclass(frozen=True)
class CaptionColumns:
    """The columns that captions stand in."""

    names: tuple[str, ...]
    reads_all: bool  # each of them has captions; False: in each row, the first that is not blank

    def of_rows(self, rows: Iterable[TableRow]) -> ImageCaptions | None:
        """The captions of an image in its rows; None where no row has such a column.

        Raises UserError for a value that is no text.
        """
        captions: list[str] = []
        has_column = False
        for row in rows:
            if any(name in row.values for name in self.names):
                has_column = True
                captions += self.of_row(row)
        return tuple(captions) if has_column else None

    def of_row(self, row: TableRow) -> ImageCaptions:
        """The captions in a row, blank ones where there are no others. Raises UserError for a value that is no text."""
        if self.reads_all:
            return tuple(text for name in self.names for text in _texts_in(row, name))
        for name in self.names:
            captions = _texts_in(row, name)
            if is_filled(captions):
                return captions
        return _texts_in(row, self.names[0])


def caption_columns(name: str, available: Collection[str], where: str) -> CaptionColumns | None:
    """The columns for a value of captions.name, out of those that `where` has.

    None where `auto` finds no column, or where files of text are meant. Raises UserError for a column that is not
    available.
    """
    if name == AUTO:
        names = tuple(column for column in CAPTION_NAMES if column in available)
        return CaptionColumns(names, reads_all=False) if names else None
    if name in TEXT_ENDINGS and name not in available:
        return None
    names = tuple(name.split(","))
    for column in names:
        if column not in available:
            raise UserError(f"{where} has no '{brief(column)}' (it has {', '.join(available)}): set captions.name")
    return CaptionColumns(names, reads_all=True)


def is_filled(captions: ImageCaptions | None) -> bool:
    """Whether at least one caption of an image is not blank; None: it has no captions."""
    return any(text.strip() for text in captions or ())


def holds_text(value: object) -> bool:
    """Whether a value is a text, or a list of texts, and not empty."""
    return bool(value) and (isinstance(value, str) or is_text_list(value))


def _texts_in(row: TableRow, column: str) -> ImageCaptions:
    """The texts in a column of a row, () where it is missing.

    Raises UserError for a value that is no text, and for a text that UTF-8 cannot hold.
    """
    value = row.values.get(column)
    if value is None:
        return ()
    texts: Any = value if isinstance(value, list) else [value]
    if not is_text_list(texts):
        raise UserError(f"{row.where}: the caption {brief(repr(value))} is no text: {CAPTION_FIX}")
    for text in texts:
        if not is_unicode(text):
            raise UserError(
                f"{row.where}: the caption {brief(ascii(text))} has half a character, a lone surrogate: {CAPTION_FIX}"
            )
    return tuple(texts)
