"""The captions of the images of a store: next to the images, in their table or in their archive.

    folder   a table of metadata (`dumo.data.metadata`); or cats/1.txt or .caption next to cats/1.jpg
    parquet  columns of texts, or of lists of texts
    tar      0001.txt, .caption or .json next to 0001.jpg

`captions_of` is the entrance. In this order it

1. collects what is written of each image in a `Pairing`, by the kind of the store. A table comes before files of text
   in a folder; a file of text before .json in an archive. In a file of text every line is a caption;
2. refuses images and captions of which too many lack their other half (`dumo.data.pairing`);
3. raises NoCaptionsError where no image has a caption;
4. warns of the few that lack their other half.

`captions.name` chooses columns (`dumo.data.column`) or files of text. Captions that edit another image are read by
`dumo.data.edit`. Everything is UTF-8, with or without a byte-order mark.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from dumo.data.column import (
    AUTO,
    CAPTION_NAMES,
    TEXT_ENDINGS,
    TableRow,
    caption_columns,
    holds_text,
    is_filled,
)
from dumo.data.edit import edit_captions
from dumo.data.metadata import (
    TABLES,
    TableRows,
    image_files,
    image_folder,
    other_tables,
    read_object,
    read_tables,
    suffix_of,
    table_names,
)
from dumo.data.pairing import ImageCaptions, NameIndex, Pairing
from dumo.data.parquet import Parquet
from dumo.data.store import Folder, Store, walk_files
from dumo.data.tar import Tar
from dumo.io.read import brief, decode_utf8, first_few, read_text
from dumo.types import UserError


class NoCaptionsError(UserError):
    """The images have no captions."""


def captions_of(
    root: Path, store: Store, name: str, source: str | None = None, *, require_pairs: bool
) -> list[ImageCaptions]:
    """The captions of each image of a store, in its order; () of an image that has none.

    `name`: captions.name, which is columns or keys, an ending in TEXT_ENDINGS, or `auto`. `source`: the column of the
    image that each caption edits; None: captions are texts alone. `require_pairs`: warn of images without a caption and
    of captions without an image, and refuse too many of them; False for a run that has begun, whose digest says what
    its captions are.

    Raises NoCaptionsError where no image has a caption; UserError for a value that is no text, a caption that edits no
    image, and too many images or captions that lack their other half.
    """
    if source:
        return edit_captions(root, store, name, source, require_pairs=require_pairs)
    if isinstance(store, Folder):
        pairing = _pair_files(root, store, name)
        endings = " or ".join(f".{ending}" for ending in TEXT_ENDINGS)
        sought = f"{', '.join(TABLES)} with file_name, and a {endings} for each image"
    elif isinstance(store, Parquet):
        pairing = _pair_rows(store, name)
        sought = f"columns {', '.join(CAPTION_NAMES)}"
    else:
        assert isinstance(store, Tar), "there is no fourth store"
        pairing = _pair_members(store, name)
        sought = f"{', '.join(f'.{ending}' for ending in TEXT_ENDINGS)} and .json next to each image"
    if require_pairs:
        pairing.refuse_orphans(root)
        if pairing.has_captions() or pairing.orphan_texts:
            pairing.refuse_uncaptioned(root)
    if not pairing.has_captions():
        raise _no_captions_error(root, store, pairing, sought)
    if require_pairs:
        pairing.warn(root)
    return pairing.texts()


def _no_captions_error(root: Path, store: Store, pairing: Pairing, sought: str) -> NoCaptionsError:
    """The error of images without captions: what was looked for, and the columns or tables that may be meant."""
    tables = other_tables(root) if isinstance(store, Folder) else []
    if pairing.columns:
        hint = f" There are columns {', '.join(pairing.columns)}: set captions.name to one,"
    elif tables:
        hint = f" There is {first_few(tables)}: call it {table_names(tables)},"
    else:
        hint = ""
    return NoCaptionsError(
        f"no captions found for the {len(store)} images of {root}: looked for {sought};{hint} or leave out "
        "data.captions"
    )


def _pair_files(root: Path, store: Folder, name: str) -> Pairing:
    """Pair the files of a folder with rows of tables in it, then with files of text.

    Raises UserError for a column that no table has.
    """
    folder = image_folder(root)
    files = list(walk_files(folder))
    paths = [os.path.abspath(file) for file in store.files]
    absolute_folder = os.path.abspath(folder)
    rows = TableRows(by_image={})
    if name != "txt":  # which means files of text alone
        rows = read_tables(folder, files)
    columns = None
    if rows.num_rows:
        tables = ", ".join(file for file in files if os.path.basename(file) in TABLES)
        columns = caption_columns(name, rows.columns, tables)
    if columns is None and name not in (AUTO, *TEXT_ENDINGS):
        raise UserError(
            f"{root} has no {' or '.join(TABLES)} that '{brief(name)}' could stand in: set captions.name=txt"
        )
    pairing = Pairing(
        captions=[None] * len(paths),
        name_of=lambda i: _path_below(absolute_folder, paths[i]),
        blank="an empty .txt",
        columns=rows.text_columns(),
    )
    if columns:  # else the tables are of other things
        pairing.captions = [columns.of_rows(rows.by_image.get(path, ())) for path in paths]
        pairing.blank = "a row with an empty text"
        pairing.num_rows = rows.num_rows
        pairing.orphan_rows = rows.orphans
    suffixes = [f".{ending}" for ending in _text_endings(name)]
    _add_text_files(pairing, paths, folder, suffixes, files)
    return pairing


def _add_text_files(
    pairing: Pairing, images: Sequence[str], folder: Path, suffixes: Sequence[str], files: Sequence[str]
) -> None:
    """Add the captions in files of text with these suffixes, where an image has none in a table.

    `images` are absolute paths, by the pairing's numbers; `files` are those in the folder. An image may have several
    files of text: the first that is not blank is read.
    """
    absolute_folder = os.path.abspath(folder)
    text_files = NameIndex(os.path.abspath(file) for file in files if suffix_of(file) in suffixes)
    images_of_text: defaultdict[str, list[str]] = defaultdict(list)
    for i, image in enumerate(images):
        stem = os.path.splitext(image)[0]
        for suffix in suffixes:
            text_file = text_files.find(stem + suffix)
            if text_file is None:
                continue
            text_name = _path_below(absolute_folder, text_file)
            images_of_text[text_name].append(_path_below(absolute_folder, image))
            captions = pairing.captions[i]
            if not is_filled(captions):
                lines = _captions_by_line(read_text(folder / text_name))
                if len(lines) > 1:
                    pairing.multiline[text_name] = None
                pairing.captions[i] = lines or captions or ()
            elif (folder / text_name).read_bytes().strip():
                pairing.unread.append(text_name)
    # a text that belongs to an image of another split lacks nothing
    other_images = {os.path.abspath(file) for file in image_files(files)} - set(images)
    other_stems = NameIndex(os.path.splitext(image)[0] for image in other_images)
    orphans: list[str] = []
    for text_file in text_files.names:
        text_name = _path_below(absolute_folder, text_file)
        has_image = text_name in images_of_text or other_stems.find(os.path.splitext(text_file)[0]) is not None
        if not has_image:
            orphans.append(text_name)
    pairing.add_texts(images_of_text, sorted(orphans))


def _pair_rows(store: Parquet, name: str) -> Pairing:
    """Pair the rows of tables with their captions. A row is an image and its captions: neither lacks the other."""
    shared = store.shared_column_names()
    has_shared_captions = any(column in shared for column in CAPTION_NAMES)
    # a column that some files lack is refused when it is read
    available = shared if name == AUTO and has_shared_captions else store.column_names()
    columns = caption_columns(name, available, store.files[0])
    pairing = Pairing(captions=[], name_of=store.path, blank="an empty text", columns=store.text_column_names())
    if columns is None:
        pairing.captions = [()] * len(store)
        return pairing
    values_by_column = [store.read_texts(column) for column in columns.names]
    for i, values in enumerate(zip(*values_by_column, strict=True)):
        row = TableRow(store.path(i), dict(zip(columns.names, values, strict=True)))
        pairing.captions.append(columns.of_row(row))
    return pairing


def _pair_members(store: Tar, name: str) -> Pairing:
    """Pair the images in archives with the members next to them: files of text, else .json."""
    endings = _text_endings(name)
    suffixes = endings if name == "txt" else (*endings, "json")
    members = store.texts(suffixes)
    rows: list[TableRow] = []
    for i, by_ending in enumerate(members.by_image):
        where = f"the .json of {store.path(i)}"
        text = decode_utf8(by_ending.get("json", b"{}"), where)
        rows.append(TableRow(where, read_object(text, where)))
    keys = dict.fromkeys(chain.from_iterable(row.values for row in rows))
    columns = caption_columns(name, keys, store.files[0]) if keys else None
    pairing = Pairing(captions=[], name_of=store.path, blank="an empty .txt", columns=_text_keys(rows))
    for i, (by_ending, row) in enumerate(zip(members.by_image, rows, strict=True)):
        captions: ImageCaptions | None = None
        for ending in endings:
            if ending not in by_ending:
                continue
            where = f"the .{ending} of {store.path(i)}"
            if not is_filled(captions):
                lines = _captions_by_line(decode_utf8(by_ending[ending], where))
                if len(lines) > 1:
                    pairing.multiline[where] = None
                captions = lines or captions or ()
            elif by_ending[ending].strip():
                pairing.unread.append(where)
        if columns and not is_filled(captions):
            row_captions = columns.of_rows([row])
            if row_captions is not None:
                captions = row_captions
        pairing.captions.append(captions)
    images_of_text = members.images_of_text
    orphans = members.orphans
    if columns is None:  # the .json files are of other things
        images_of_text = {text: images for text, images in images_of_text.items() if suffix_of(text) != ".json"}
        orphans = [text for text in orphans if suffix_of(text) != ".json"]
    pairing.add_texts(images_of_text, orphans)
    return pairing


def _text_endings(name: str) -> tuple[str, ...]:
    """The endings of the files of text that are read for a value of captions.name, in their order."""
    if name == AUTO:
        return TEXT_ENDINGS
    return (name,) if name in TEXT_ENDINGS else ()


def _captions_by_line(text: str) -> ImageCaptions:
    """A caption for each line of a text that is not blank. A line ends with "\\n" or "\\r\\n" alone."""
    lines = [line.strip() for line in text.split("\n")]
    return tuple(line for line in lines if line)


def _text_keys(rows: Iterable[TableRow]) -> tuple[str, ...]:
    """The keys that hold a text in some row, in the order in which the texts come."""
    keys: dict[str, None] = {}
    for row in rows:
        for key, value in row.values.items():
            if holds_text(value):
                keys[key] = None
    return tuple(keys)


def _path_below(folder: str, file: str) -> str:
    """A file's path from a folder that holds it, both absolute; `os.path.relpath` is slow."""
    return file.removeprefix(folder).lstrip(os.sep)
