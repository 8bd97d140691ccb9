"""What was written of images, next to them, in their table or their archive.

    folder   metadata.csv, .jsonl or .parquet of file_name, cats/1.jpg, and text; or cats/1.txt or .caption
    parquet  a column of texts, or of lists of them
    tar      0001.txt, .caption or .json next to 0001.jpg

An image that is edited stands in a column of its own, as a path from the table's folder, outside of the images' root.

In a table the captions stand under the names that are set, separated by commas; else, in each row, under the first of
NAMES that is not blank there. Each is one text, or a list of several. An image may have several rows. In a file of text
every line is a caption of its own. It is read where no table has a caption of its image.

Everything is UTF-8, with or without a byte-order mark. A text stays as it is written; how the names of images are
compared, and what becomes of captions without an image, says `dumo.data.pairing`.

With latents they stand in captions.jsonl, a JSON list of texts to a line in the images' order, so that training, and
encoding the texts, need no images.

`captions_of` reads the captions of a store's images: `in_files`, `in_tables` and `in_archives` find them, as a
`Pairing`, which refuses and warns; `edited` and `edits` find those of images that are edited. `dump_lines` and
`read_lines` are of captions.jsonl.
"""

import csv
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

from dumo.data.pairing import ImageCaptions, NameIndex, Orphan, Pairing, first_few
from dumo.data.parquet import Parquet, columns, columns_of_all, decoded, open_table, text_columns, whole
from dumo.data.pixel import IMAGE_SUFFIXES
from dumo.data.store import Folder, Store, walk
from dumo.data.tar import Tar
from dumo.encoders.caption import Captions, edit
from dumo.io import digest
from dumo.io.read import brief, decode, is_unicode, read_text, text_lines
from dumo.types import UserError

NAMES = ("text", "caption", "captions", "prompt")  # the hub's, webdataset's and ours
LINES = "captions.jsonl"
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", LINES)
TEXT = ("txt", "caption")  # in place of a name: files of text, by their endings. kohya's trainers write the second
AUTO = "auto"
MEND = "mend it, or set captions.name"
REWRITE = "remove it, and dumo encode writes it from the images"

DELIMITERS = ",;\t"  # of a CSV file's columns: spreadsheets write the others, too
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


class NoCaptionsError(UserError):
    """The images have no captions. There may be texts in `columns`, or in `tables` of other names than TABLES."""

    def __init__(self, message: str, columns: Sequence[str] = (), tables: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.columns = columns
        self.tables = tables


def dump_lines(captions: Captions) -> bytes:
    """As `read_lines` reads it."""
    texts = captions.texts
    text_ids = captions.ids.tolist()
    lines: list[str] = []
    for first, end in pairwise([0, *captions.ends.tolist()]):
        image_texts = [texts[k] for k in text_ids[first:end] if k < len(texts)]
        lines.append(f"{json.dumps(image_texts, ensure_ascii=False)}\n")
    return "".join(lines).encode()


def read_lines(file: Path) -> Captions:
    """The captions by image. Raises UserError where there is no such file, or it is damaged."""
    if not file.is_file():
        raise UserError(f"{file} is not there, which has the images' captions: start the same dumo encode again")
    return Captions.of(_read_texts(file))


def require_lines(file: Path, captions: Captions) -> None:
    """Raise UserError where a file is there that holds others."""
    if file.exists() and file.read_bytes() != dump_lines(captions):
        raise UserError(
            f"{file} holds other captions than the images have now: {REWRITE}; runs of the old ones need it"
        )


def _read_texts(file: Path) -> Iterator[list[str]]:
    for number, line in enumerate(text_lines(file, REWRITE), 1):
        yield read_line(line, f"{file} line {number}", "list of texts", are_texts, REWRITE)


def read_line(text: str, where: str, what: str, fits: Callable[[Any], bool], way_out: str) -> Any:  # noqa: ANN401
    """The value of a line of JSON. Raises UserError for what is not JSON, or does not fit: no `what`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): {way_out}") from error
    if not fits(value):
        raise UserError(f"{where} is no {what}: {way_out}")
    return value


def are_texts(value: object) -> bool:
    """Whether it is a list of them."""
    return isinstance(value, list) and all(isinstance(text, str) for text in cast(list[object], value))


def captions_of(
    root: Path, store: Store, name: str, source: str | None = None, *, require_pairs: bool = True
) -> list[ImageCaptions]:
    """The captions of each image of a store, in its order; () of one that has none.

    `name`: the columns or keys that they stand under, an ending in TEXT, or `auto`; `source`: the column of the image
    that they edit. `require_pairs`: warn of images without a caption and of captions without an image, and refuse too
    many of them; False of a run that has begun, whose digest says what its captions are.

    Raises NoCaptionsError where no image has one, UserError where what stands there is no text, edits no image, or
    where too much lacks its other half.
    """
    if source:
        rows_by_file = edited(root, store, source, require_pairs=require_pairs)
        return [edits(rows, name, source, file) for file, rows in rows_by_file]
    if isinstance(store, Folder):
        pairing = in_files(root, store, name)
        sought = f"{', '.join(TABLES)} with file_name, and a {' or '.join(f'.{end}' for end in TEXT)} for each image"
    elif isinstance(store, Parquet):
        pairing = in_tables(store, name)
        sought = f"columns {', '.join(NAMES)}"
    else:
        assert isinstance(store, Tar), "there is no fourth store"
        pairing = in_archives(store, name)
        sought = f"{', '.join(f'.{end}' for end in TEXT)} and .json next to each image"
    if require_pairs:
        pairing.refuse_orphans(root)
        if pairing.has_captions() or pairing.orphan_texts:
            pairing.refuse_uncaptioned(root)
    if not pairing.has_captions():
        tables = other_tables(root) if isinstance(store, Folder) else []
        if pairing.columns:
            has = f" There are columns {', '.join(pairing.columns)}: set captions.name to one,"
        elif tables:
            has = f" There is {first_few(tables)}: call it {table_names(tables)},"
        else:
            has = ""
        raise NoCaptionsError(
            f"no captions found for the {len(store)} images of {root}: looked for {sought};{has}"
            " or leave out data.captions",
            pairing.columns,
            tables,
        )
    if require_pairs:
        pairing.warn(root)
    return pairing.texts()


def other_tables(root: Path) -> list[str]:
    """The tables in a folder of images that are not read, by their names."""
    folder = image_folder(root)
    names = (os.path.relpath(file, folder) for file in walk(folder) if os.path.basename(file) not in TABLES)
    return [name for name in names if ending_of(name).lower() in TABLE_ENDINGS]


def table_names(files: Iterable[str]) -> str:
    """What tables of these endings are called so that they are read: `metadata.csv or metadata.jsonl`."""
    endings = [ending_of(file).lower().replace(".tsv", ".csv") for file in files]  # columns may be cut by tabs in both
    return " or ".join(dict.fromkeys(f"metadata{ending}" for ending in endings))


def image_folder(root: Path) -> Path:
    """The folder of the images, which may be one file."""
    return root if root.is_dir() else root.parent


@dataclass(frozen=True)
class TableRow:
    """A row of a table, without the name of its image."""

    where: str  # the table and the line, for a message
    values: dict[str, Any]


@dataclass
class TableRows:
    """The rows of all tables of a folder."""

    by_image: dict[str, list[TableRow]]  # by the image's whole path
    orphans: list[Orphan] = field(default_factory=list[Orphan])
    num_rows: int = 0
    columns: dict[str, bool] = field(default_factory=dict[str, bool])  # whether one holds texts, by its name

    def add_columns(self, row: Mapping[str, object]) -> None:
        """Note the columns of a row."""
        for name, value in row.items():
            self.columns[name] = self.columns.get(name, False) or holds_text(value)

    def text_columns(self) -> tuple[str, ...]:
        """Those that hold texts."""
        return tuple(name for name, is_text in self.columns.items() if is_text)


def holds_text(value: object) -> bool:
    """Whether this is a text, or a list of texts, and not empty."""
    return bool(value) and (isinstance(value, str) or are_texts(value))


def ending_of(file: str) -> str:
    """What a file's name ends in, `.txt`."""
    return os.path.splitext(file)[1]


def image_files(files: Iterable[str]) -> list[str]:
    """Those that are taken for images, by their names."""
    return [file for file in files if ending_of(file).lower() in IMAGE_SUFFIXES]


def read_tables(folder: Path, files: Iterable[str], source: str | None = None) -> TableRows:
    """The rows of the tables among a folder's files, each with the image in it that the row names.

    In the column `source` stands the place of the image that is edited, afterwards from the working folder.
    """
    files = list(files)
    images = NameIndex(os.path.abspath(file) for file in image_files(files))
    rows = TableRows(by_image=defaultdict(list))
    for table in files:
        if os.path.basename(table) not in TABLES:
            continue
        above = os.path.dirname(table)
        for where, file_name, row in rows_of(table):
            rows.num_rows += 1
            rows.add_columns(row)
            edited_file = row.get(source) if source else None
            if source and isinstance(edited_file, str):
                row[source] = place_of(os.path.normpath(os.path.join(above, edited_file)))
            path = os.path.abspath(os.path.join(above, file_name))
            image = images.find(path) or images.find(path.replace("\\", "/"))  # as Windows writes it
            if image:
                rows.by_image[image].append(TableRow(where, row))
            else:
                rows.orphans.append(Orphan(file_name, os.path.relpath(where, folder)))
    return rows


def place_of(path: str) -> str:
    """Where a file of this name is, in Unicode's form C or D; where it is in neither, the path as it is."""
    for form in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
        if os.path.exists(form):
            return form
    return path


def in_files(root: Path, store: Folder, name: str) -> Pairing:
    """Of files: by tables in the folder, else by a file of text for each."""
    folder = image_folder(root)
    files = list(walk(folder))
    above = os.path.abspath(folder)
    paths = [os.path.abspath(file) for file in store.files]
    rows = read_tables(folder, files) if name != TEXT[0] else TableRows(by_image={})
    tables = ", ".join(file for file in files if os.path.basename(file) in TABLES)
    columns = caption_columns(name, rows.columns, tables) if rows.num_rows else None
    if columns is None and name not in (AUTO, *TEXT):
        raise UserError(
            f"{root} has no {' or '.join(TABLES)} that '{brief(name)}' could stand in: set captions.name=txt"
        )
    pairing = Pairing(
        captions=[columns.of_rows(rows.by_image.get(path, ())) if columns else None for path in paths],
        name_of=lambda i: name_below(above, paths[i]),
        blank="a row with an empty text" if columns else "an empty .txt",
        columns=rows.text_columns(),
    )
    if columns:  # else the tables are of other things
        pairing.num_rows = rows.num_rows
        pairing.orphan_rows = rows.orphans
    endings = tuple(f".{ending}" for ending in endings_of(name))
    add_text_files(pairing, paths, folder, endings, files)
    return pairing


def add_text_files(
    pairing: Pairing, images: Sequence[str], folder: Path, endings: Sequence[str], files: Sequence[str]
) -> None:
    """Add the captions of files of text with these endings, where an image has none in a table.

    `images` are whole paths, by the pairing's numbers; `files` are those in the folder. Of several files of text of an
    image, the first that is not blank is read.
    """
    above = os.path.abspath(folder)
    text_files = NameIndex(os.path.abspath(file) for file in files if ending_of(file).lower() in endings)
    other_images = {os.path.abspath(file) for file in image_files(files)} - set(images)  # of other splits
    other_stems = NameIndex(os.path.splitext(image)[0] for image in other_images)
    images_of_text: defaultdict[str, list[str]] = defaultdict(list)
    for i, image in enumerate(images):
        stem = os.path.splitext(image)[0]
        for ending in endings:
            text_file = text_files.find(stem + ending)
            if text_file is None:
                continue
            name = name_below(above, text_file)
            images_of_text[name].append(name_below(above, image))
            captions = pairing.captions[i]
            if not is_filled(captions):
                pairing.captions[i] = split(read_text(folder / name, MEND)) or captions or ()
            elif (folder / name).read_bytes().strip():
                pairing.unread.append(name)
    of_no_other = [file for file in text_files.names if other_stems.find(os.path.splitext(file)[0]) is None]
    names = {name_below(above, file) for file in of_no_other}
    pairing.add_texts(images_of_text, sorted(names - images_of_text.keys()))


def name_below(folder: str, file: str) -> str:
    """A file's path from a folder that holds it; `os.path.relpath` is slow."""
    return file.removeprefix(folder).lstrip(os.sep)


def endings_of(name: str) -> tuple[str, ...]:
    """The endings of files of text that are read, in their order."""
    if name == AUTO:
        return TEXT
    return (name,) if name in TEXT else ()


def edited(root: Path, store: Store, source: str, *, require_pairs: bool = False) -> list[tuple[str, list[TableRow]]]:
    """Each image's file and rows, `source` in them the place of what is edited.

    Raises UserError where an image has none; with `require_pairs`, as `captions_of` for rows without an image.
    """
    folder = image_folder(root)
    tables = read_tables(folder, walk(folder), source)
    rows_by_file: list[tuple[str, list[TableRow]]] = []
    for file in store.files if isinstance(store, Folder) else ():
        rows = tables.by_image.get(os.path.abspath(file), [])
        rows_by_file.append((os.path.normpath(file), [row for row in rows if isinstance(row.values.get(source), str)]))
    pairing = Pairing(
        captions=[() if rows else None for _, rows in rows_by_file],
        name_of=lambda i: os.path.relpath(rows_by_file[i][0], folder),
        blank="",  # there is none: each image edits another
        num_rows=tables.num_rows,
        orphan_rows=tables.orphans,
    )
    if require_pairs:
        pairing.refuse_orphans(root)
    missing = [file for file, rows in rows_by_file if not rows]
    if missing or not rows_by_file:
        raise UserError(
            f"{missing[0] if missing else root} has no row with '{brief(source)}' in {' or '.join(TABLES)}: give each "
            "image in data.root a row that names the image it was edited from; keep the originals outside data.root"
        )
    if require_pairs:
        pairing.warn(root)
    return rows_by_file


def edits(rows: list[TableRow], name: str, source: str, where: str) -> ImageCaptions:
    """The captions of an image, each with the hash of what it edits. Raises UserError as `captions_of`."""
    captions: list[str] = []
    for row in rows:
        columns = caption_columns(name, row.values, where)
        for text in columns.of_row(row) if columns else ():
            if text.strip():
                captions.append(edit(text, hash_of(Path(row.values[source]))))
    if not captions:
        raise UserError(f"{where} has no text: {MEND}")
    return tuple(captions)


def hash_of(file: Path) -> str:
    """The SHA-256 of an image that is edited, read again where it has changed. Raises UserError where it is missing."""
    if not file.is_file():
        raise UserError(f"{file} is missing, an image to edit: put it there, or mend captions.source")
    about = file.stat()
    return _hash_of_state(file, about.st_mtime_ns, about.st_size)


@lru_cache(None)
def _hash_of_state(file: Path, changed: int, size: int) -> str:
    return digest.of_file(file)


def rows_of(table: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The rows of a table, each with its place, and the file that it names."""
    match ending_of(table):
        case ".csv":
            rows = csv_rows(table)
        case ".parquet":
            rows = parquet_rows(table)
        case _:
            rows = json_rows(table)
    for where, row in rows:
        if "file_name" not in row:
            raise UserError(f"{where} has no file_name (it has {', '.join(row)}): each row says it, and its text")
        file_name = row.pop("file_name")
        if not isinstance(file_name, str):
            raise UserError(
                f"{where}: file_name={brief(repr(file_name))} is no text: give the image's path from the table's folder"
            )
        yield where, file_name, row


def json_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a table of JSON, each with its place."""
    for number, line in enumerate(text_lines(Path(table), MEND), 1):
        if line.strip():
            where = f"{table} line {number}"
            yield where, read_object(line, where)


def csv_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines below the first, which names the columns, each with its place.

    A line with fewer fields than the first says nothing of the last columns.
    """
    lines = text_lines(Path(table), MEND)
    first_line = next(lines, "")
    delimiter = delimiter_of(first_line)
    reader = csv.reader(chain([first_line], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{table} line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{where} is no CSV ({error}): close each quote that opens, and write a quote within quotes twice"
            ) from error
        if fields is None:
            return
        if header is None:
            header = [name.strip() for name in fields]
            if len(set(header)) < len(header):
                raise UserError(f"{where} names a column twice ({', '.join(header)}): rename one")
            continue
        if len(fields) > len(header):
            raise UserError(
                f"{where} has {len(fields)} fields, and the first line has {len(header)}: put a text that holds the "
                f"separator {delimiter!r} into double quotes"
            )
        if fields:
            yield where, dict(zip(header, fields, strict=False))


def delimiter_of(first_line: str) -> str:
    """What stands between the columns of CSV, one of DELIMITERS: that which parts `file_name` from the others."""
    for delimiter in DELIMITERS:
        if "file_name" in (name.strip().strip('"') for name in first_line.split(delimiter)):
            return delimiter
    return DELIMITERS[0]


def parquet_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table of parquet, each with its place."""
    number = 0
    with whole(table):
        for part in open_table(table).iter_batches(use_threads=False):
            for row in decoded(part, table, number):
                yield f"{table} row {number}", row
                number += 1


def in_tables(store: Parquet, name: str) -> Pairing:
    """Of rows of tables. A row is an image and its captions, so that none of them lacks the other."""
    shared = columns_of_all(store)
    if name == AUTO and any(column in shared for column in NAMES):
        captions_in = caption_columns(name, shared, store.files[0])
    else:  # one that some files lack is refused as it is read
        captions_in = caption_columns(name, columns(store), store.files[0])
    pairing = Pairing(captions=[], name_of=store.path, blank="an empty text", columns=text_columns(store))
    if captions_in is None:
        pairing.captions = [()] * len(store)
        return pairing
    values_by_column = [store.read_texts(column) for column in captions_in.names]
    for i, values in enumerate(zip(*values_by_column, strict=True)):
        row = TableRow(store.path(i), dict(zip(captions_in.names, values, strict=True)))
        pairing.captions.append(captions_in.of_row(row))
    return pairing


def in_archives(store: Tar, name: str) -> Pairing:
    """Of members of archives: their text, else what their JSON says."""
    endings = endings_of(name)
    members = store.texts(endings if name == TEXT[0] else (*endings, "json"))
    rows: list[TableRow] = []
    for i, by_ending in enumerate(members.by_image):
        where = f"the .json of {store.path(i)}"
        rows.append(TableRow(where, read_object(decode(by_ending.get("json", b"{}"), where, MEND), where)))
    keys = dict.fromkeys(chain.from_iterable(row.values for row in rows))
    columns = caption_columns(name, keys, store.files[0]) if keys else None
    pairing = Pairing(
        captions=[],
        name_of=store.path,
        blank="an empty .txt",
        columns=text_keys(rows),
    )
    for i, (by_ending, row) in enumerate(zip(members.by_image, rows, strict=True)):
        captions: ImageCaptions | None = None
        for ending in endings:
            if ending not in by_ending:
                continue
            where = f"the .{ending} of {store.path(i)}"
            if not is_filled(captions):
                captions = split(decode(by_ending[ending], where, MEND)) or captions or ()
            elif by_ending[ending].strip():
                pairing.unread.append(where)
        if columns and not is_filled(captions):
            of_row = columns.of_rows([row])
            captions = captions if of_row is None else of_row
        pairing.captions.append(captions)
    images_of_text = members.images_of_text
    orphans = members.orphans
    if columns is None:  # the .json files are of other things
        images_of_text = {name: images for name, images in images_of_text.items() if not is_json(name)}
        orphans = [name for name in orphans if not is_json(name)]
    pairing.add_texts(images_of_text, orphans)
    return pairing


def text_keys(rows: Iterable[TableRow]) -> tuple[str, ...]:
    """The keys that hold a text in some row, in the order in which they come."""
    keys: dict[str, None] = {}
    for row in rows:
        for key, value in row.values.items():
            if holds_text(value):
                keys[key] = None
    return tuple(keys)


def is_json(file: str) -> bool:
    """Whether a file is of JSON, by its name."""
    return ending_of(file).lower() == ".json"


@dataclass(frozen=True)
class CaptionColumns:
    """The columns, or keys of JSON, that captions stand under."""

    names: tuple[str, ...]
    every: bool  # each of them has captions; False: in each row, the first that is not blank

    def of_rows(self, rows: Iterable[TableRow]) -> ImageCaptions | None:
        """The captions of an image in its rows; None where no row has such a column.

        Raises UserError for what is no text.
        """
        stating = [row for row in rows if any(name in row.values for name in self.names)]
        if not stating:
            return None
        return tuple(chain.from_iterable(self.of_row(row) for row in stating))

    def of_row(self, row: TableRow) -> ImageCaptions:
        """The captions in a row, blank ones where there are no others. Raises UserError for what is no text."""
        if self.every:
            return tuple(text for name in self.names for text in texts(row.values.get(name), row.where))
        for name in self.names:
            captions = texts(row.values.get(name), row.where)
            if is_filled(captions):
                return captions
        return texts(row.values.get(self.names[0]), row.where)


def caption_columns(name: str, available: Iterable[str], where: str) -> CaptionColumns | None:
    """The columns that captions stand in; None where `auto` finds none, or files of text are meant.

    Raises UserError for one that is not there.
    """
    if name == AUTO:
        names = tuple(column for column in NAMES if column in available)
        return CaptionColumns(names, every=False) if names else None
    if name in TEXT and name not in available:
        return None
    names = tuple(name.split(","))
    for column in names:
        if column not in available:
            raise UserError(f"{where} has no '{brief(column)}' (it has {', '.join(available)}): set captions.name")
    return CaptionColumns(names, every=True)


def is_filled(captions: ImageCaptions | None) -> bool:
    """Whether one of an image's captions is not blank."""
    return any(text.strip() for text in captions or ())


def texts(value: object, where: str) -> ImageCaptions:
    """One text, a list of them, or none. Raises UserError for what is no text, or none that UTF-8 can hold."""
    if value is None:
        return ()
    listed: Any = value if isinstance(value, list) else [value]
    if not are_texts(listed):
        raise UserError(f"{where}: the caption {brief(repr(value))} is no text: {MEND}")
    for text in listed:
        if not is_unicode(text):
            raise UserError(f"{where}: the caption {brief(ascii(text))} has half a character, a lone surrogate: {MEND}")
    return tuple(listed)


def split(text: str) -> ImageCaptions:
    """A caption a line, blank ones left out."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def read_object(text: str, where: str) -> dict[str, Any]:
    """An object of JSON. Raises UserError for anything else."""
    return read_line(text, where, 'JSON object, as in {"text": "a cat"}', lambda row: isinstance(row, dict), MEND)
