"""Which images have a caption, and which captions have an image.

`dumo.data.annotation` fills a `Pairing` with what is written of each image, and with orphans: rows of tables and files
of text without an image. Then

1. `refuse_orphans` and `refuse_uncaptioned` raise where more than MAX_SHARE lack their other half. A blank text lacks
   nothing: it says that its image shall have no caption;
2. `warn` counts what is left over, and names the first few;
3. `texts` gives the captions.

`NameIndex` finds an image by its name in a row. Two names are equal where they are in Unicode's form C: macOS writes
the letter "é" as two characters, most tables have it as one. No other difference is bridged: of names that differ in
case or in blanks alone, a message shows both.
"""

import os
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dumo.io.read import first_few
from dumo.io.suffix import IMAGE_SUFFIXES
from dumo.types import UserError

# Ours. Where names are wrong as a whole (case, a folder too many), or a download broke off, most do not match; where
# somebody wrote captions by hand, a few were forgotten. One who captions half of a set on purpose can say so.
MAX_SHARE = 0.1
_ORPHAN_TEXTS = 3  # files of text without an image that are never refused: README.txt and its like. Ours
TEXT_SUFFIXES = (".txt", ".caption", ".json")  # of what is paired by its name; .json in archives alone

ImageCaptions = tuple[str, ...]  # captions of one image


def normal_form(name: str) -> str:
    """A name as it is compared: in Unicode's form C."""
    return unicodedata.normalize("NFC", name)


class NameIndex:
    """Names that are looked up as they are, else in Unicode's form C."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.by_normal_form = {normal_form(name): name for name in self.names}

    def find(self, name: str) -> str | None:
        """The name that this one means; None where there is none."""
        if name in self.names:
            return name
        return self.by_normal_form.get(normal_form(name))


@dataclass(frozen=True)
class Orphan:
    """A caption without an image."""

    name: str  # of the image, as the row has it, or of the file of text
    row: str = ""  # where the row is, `metadata.csv line 3`; "": it is a file of text

    def __str__(self) -> str:
        """The name, and where it is."""
        return f"'{self.name}' in {self.row}" if self.row else f"'{self.name}'"


@dataclass
class Pairing:
    """What is written of each image of a store, and the orphans."""

    captions: list[ImageCaptions | None]  # by image, in the store's order; None: nothing names the image
    name_of: Callable[[int], str]  # the name of image i, for a message
    blank: str  # how one says that an image shall have no caption
    columns: Sequence[str] = ()  # columns that hold texts, read or not

    num_rows: int = 0  # of tables, in all
    orphan_rows: list[Orphan] = field(default_factory=list[Orphan])

    num_texts: int = 0  # files of text, in all
    orphan_texts: list[Orphan] = field(default_factory=list[Orphan])
    unread: list[str] = field(default_factory=list[str])  # files of text whose image has a caption elsewhere
    multiline: dict[str, None] = field(default_factory=dict[str, None])  # files of text with several captions
    shared: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # by file of text, its several images

    def add_texts(self, images_of_text: Mapping[str, list[str]], orphan_names: Sequence[str]) -> None:
        """Add the images of each file of text, and the names of the files that belong to none.

        Where no file belongs to an image, nor nearly, they are other texts than captions, such as README.txt, and no
        orphans.
        """
        orphans = [Orphan(name) for name in orphan_names]
        if images_of_text or any(self._near_pairs(orphans)):
            self.num_texts = len(images_of_text) + len(orphans)
            self.orphan_texts = orphans
        self.shared = {text: images for text, images in images_of_text.items() if len(images) > 1}

    def texts(self) -> list[ImageCaptions]:
        """The captions of each image."""
        return [captions or () for captions in self.captions]

    def has_captions(self) -> bool:
        """Whether any image has a caption."""
        return any(text.strip() for captions in self.captions for text in captions or ())

    def refuse_orphans(self, root: Path) -> None:
        """Raise UserError where more than MAX_SHARE of the captions have no image.

        Files of text have other uses, too, such as README.txt: _ORPHAN_TEXTS of them are never refused.
        """
        num_orphan_rows = len(self.orphan_rows)
        if num_orphan_rows > MAX_SHARE * self.num_rows:
            raise UserError(
                f"{root}: {self._orphan_row_line()}{self._near_pair()}. More than {MAX_SHARE:.0%} are refused: mend "
                "the names, bring the images, or remove these rows"
            )
        num_orphan_texts = len(self.orphan_texts)
        if num_orphan_texts > _ORPHAN_TEXTS and num_orphan_texts > MAX_SHARE * self.num_texts:
            raise UserError(
                f"{root}: {self._orphan_text_line()}{self._near_pair()}. More than {MAX_SHARE:.0%} are refused: mend "
                "the names, bring the images, or remove these files"
            )

    def refuse_uncaptioned(self, root: Path) -> None:
        """Raise UserError where more than MAX_SHARE of the images have no caption, nor a blank one."""
        num_uncaptioned = len(self._uncaptioned())
        if num_uncaptioned > MAX_SHARE * len(self.captions):
            raise UserError(
                f"{root}: {self._uncaptioned_line()}{self._near_pair()}. More than {MAX_SHARE:.0%} are refused: write "
                f"them, or say of each image that it shall have none, by {self.blank}"
            )

    def warn(self, root: Path) -> None:
        """Warn, once in this process, of images without captions, of orphans, and of how files of text are read."""
        lines: list[str] = []  # of the message, one for each kind
        if self.orphan_rows:
            lines.append(self._orphan_row_line())
        if self.orphan_texts:
            lines.append(self._orphan_text_line())
        if self._uncaptioned():
            lines.append(self._uncaptioned_line())
        if lines:
            lines[-1] += self._near_pair()
        if self.unread:
            texts = f"{_count(len(self.unread), 'file')} of text"
            names = first_few(self.unread, repr)
            lines.append(f"{texts} not read, as the image has a caption in a table, or in a .txt: {names}")
        if self.multiline:
            texts = f"{_count(len(self.multiline), 'file')} of text"
            lines.append(f"{texts} with several lines, each of which is a caption: {first_few(self.multiline, repr)}")
        if self.shared:
            example, images = next(iter(self.shared.items()))
            texts = f"{_count(len(self.shared), 'file')} of text"
            lines.append(
                f"{texts} with several images of one name, which share the captions: "
                f"'{example}' of {first_few(images, repr)}"
            )
        for line in lines:
            warn_once(f"{root}: {line}")

    def _uncaptioned(self) -> list[int]:
        """The numbers of the images without a caption, blank or not."""
        return [i for i, captions in enumerate(self.captions) if captions is None]

    def _uncaptioned_line(self) -> str:
        uncaptioned = self._uncaptioned()
        names = first_few(f"'{self.name_of(i)}'" for i in uncaptioned)
        return f"{len(uncaptioned):,} of {_count(len(self.captions), 'image')} without a caption: {names}"

    def _orphan_row_line(self) -> str:
        rows = _count(self.num_rows, "row")
        return f"{len(self.orphan_rows):,} of {rows} without an image: {first_few(self.orphan_rows)}"

    def _orphan_text_line(self) -> str:
        texts = f"{_count(self.num_texts, 'file')} of text"
        return f"{len(self.orphan_texts):,} of {texts} without an image: {first_few(self.orphan_texts)}"

    def _near_pair(self) -> str:
        """An orphan and an uncaptioned image of nearly one name, in words; "" where there are none."""
        pair = next(self._near_pairs([*self.orphan_rows, *self.orphan_texts]), None)
        if pair is None:
            return ""
        orphan, image = pair
        return f"; nearly the same are {orphan} and the image '{image}'"

    def _near_pairs(self, orphans: Iterable[Orphan]) -> Iterator[tuple[Orphan, str]]:
        """Each orphan with an uncaptioned image of nearly its name: first by whole path, else by file name."""
        images = [self.name_of(i) for i in self._uncaptioned()]
        by_path = {_loose_form(name): name for name in images}
        by_file_name = {_loose_form(name).rpartition("/")[2]: name for name in images}
        for orphan in orphans:
            path = _loose_form(orphan.name)
            image = by_path.get(path) or by_file_name.get(path.rpartition("/")[2])
            if image:
                yield orphan, image


@cache
def warn_once(message: str) -> None:
    """Warn once in this process: captions are read when a run is proposed, and again when it is opened."""
    warnings.warn(message, stacklevel=2)


def _loose_form(name: str) -> str:
    """A name without what people get wrong in it: case, blanks, slashes, the endings of images and texts."""
    loose = "".join(normal_form(name).casefold().replace("\\", "/").split())
    stem, ending = os.path.splitext(loose)
    while ending in IMAGE_SUFFIXES or ending in TEXT_SUFFIXES:
        loose = stem
        stem, ending = os.path.splitext(loose)
    return loose


def _count(number: int, noun: str) -> str:
    """A number with its noun: `1 file`, `1,234 files`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
