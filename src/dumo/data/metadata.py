"""The tables in a folder of images: metadata.csv, .jsonl or .parquet, and captions.jsonl.

Each row names an image in the column `file_name`, by its path from the table's folder, and says more of it in other
columns. An image may have several rows. Everything is UTF-8, with or without a byte-order mark.

`read_tables` reads all tables of a folder and finds the image of each row. `other_tables` and `table_names` say which
tables are not read because of their names, and what to call them.
"""

import csv
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from dumo.data.column import CAPTION_FIX, TableRow, holds_text
from dumo.data.pairing import NameIndex, Orphan
from dumo.data.parquet import decode_rows, open_table, readable
from dumo.data.store import walk_files
from dumo.io.read import brief, parse_json, text_lines
from dumo.io.suffix import IMAGE_SUFFIXES
from dumo.types import UserError

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "captions.jsonl")  # names of tables that are read
_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_DELIMITERS = ",;\t"  # between the columns of a CSV file; spreadsheets write the last two


@dataclass
class TableRows:
    """The rows of all tables of a folder."""

    by_image: dict[str, list[TableRow]]  # by the image's absolute path
    orphans: list[Orphan] = field(default_factory=list[Orphan])  # rows without an image
    num_rows: int = 0
    columns: dict[str, bool] = field(default_factory=dict[str, bool])  # by name: whether a row has a text there

    def add_columns(self, row: Mapping[str, object]) -> None:
        """Note the columns of a row."""
        for name, value in row.items():
            self.columns[name] = self.columns.get(name, False) or holds_text(value)

    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold texts."""
        return tuple(name for name, has_text in self.columns.items() if has_text)


def read_tables(folder: Path, files: Iterable[str], source: str | None = None) -> TableRows:
    """Read the tables among a folder's files, and find each row's image among them.

    `source` names the column of the image that a caption edits: its path from the table's folder becomes a path from
    the working folder. Raises UserError for a damaged table, or a row without `file_name`.
    """
    files = list(files)
    images = NameIndex(os.path.abspath(file) for file in image_files(files))
    rows = TableRows(by_image=defaultdict(list))
    for table in files:
        if os.path.basename(table) not in TABLES:
            continue
        table_folder = os.path.dirname(table)
        for where, file_name, row in _named_rows(table):
            rows.num_rows += 1
            rows.add_columns(row)
            source_path = row.get(source) if source else None
            if source and isinstance(source_path, str):
                row[source] = _existing_form(os.path.normpath(os.path.join(table_folder, source_path)))
            path = os.path.abspath(os.path.join(table_folder, file_name))
            image = images.find(path)
            if image is None:
                image = images.find(path.replace("\\", "/"))  # as Windows writes it
            if image is None:
                rows.orphans.append(Orphan(file_name, os.path.relpath(where, folder)))
            else:
                rows.by_image[image].append(TableRow(where, row))
    return rows


def other_tables(root: Path) -> list[str]:
    """The tables in a folder of images that are not read because of their names, by their paths from the folder."""
    folder = image_folder(root)
    names: list[str] = []
    for file in walk_files(folder):
        if os.path.basename(file) not in TABLES and suffix_of(file) in _TABLE_SUFFIXES:
            names.append(os.path.relpath(file, folder))
    return names


def table_names(files: Iterable[str]) -> str:
    """The names under which tables would be read, by their endings: `metadata.csv or metadata.jsonl`."""
    suffixes = [suffix_of(file).replace(".tsv", ".csv") for file in files]  # columns may be cut by tabs in both
    return " or ".join(dict.fromkeys(f"metadata{suffix}" for suffix in suffixes))


def image_folder(root: Path) -> Path:
    """The folder of the images, where `root` is a folder or one file."""
    return root if root.is_dir() else root.parent


def image_files(files: Iterable[str]) -> list[str]:
    """The files that are images by their endings."""
    return [file for file in files if suffix_of(file) in IMAGE_SUFFIXES]


def suffix_of(file: str) -> str:
    """A file's ending, with its dot, in lower case: `.txt`."""
    return os.path.splitext(file)[1].lower()


def read_object(text: str, where: str) -> dict[str, Any]:
    """An object of JSON in a text. Raises UserError for anything else."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise UserError(f'{where} is no JSON object, as in {{"text": "a cat"}}: {CAPTION_FIX}')
    return value


def _existing_form(path: str) -> str:
    """A path in the form, as given or Unicode's C or D, in which a file exists; as given where none does."""
    for form in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
        if os.path.exists(form):
            return form
    return path


def _named_rows(table: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each row of a table: where it is, its `file_name`, and its other columns. Raises UserError for no such name."""
    match os.path.splitext(table)[1]:
        case ".csv":
            rows = _csv_rows(table)
        case ".parquet":
            rows = _parquet_rows(table)
        case _:
            rows = _json_rows(table)
    for where, row in rows:
        if "file_name" not in row:
            raise UserError(f"{where} has no file_name (it has {', '.join(row)}): each row says it, and its text")
        file_name = row.pop("file_name")
        if not isinstance(file_name, str):
            raise UserError(
                f"{where}: file_name={brief(repr(file_name))} is no text: give the image's path from the table's folder"
            )
        yield where, file_name, row


def _json_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a table of JSON that is not blank: where it is, and its columns."""
    for number, line in enumerate(text_lines(Path(table)), 1):
        if line.strip():
            where = f"{table} line {number}"
            yield where, read_object(line, where)


def _csv_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line below the first, which names the columns: where it is, and its columns.

    A line with fewer fields than the first says nothing of the last columns.
    """
    lines = text_lines(Path(table))
    first_line = next(lines, "")
    delimiter = _delimiter_of(first_line)
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


def _delimiter_of(first_line: str) -> str:
    """The delimiter of a CSV file, the first of _DELIMITERS that parts `file_name` from the other columns."""
    for delimiter in _DELIMITERS:
        if "file_name" in (name.strip().strip('"') for name in first_line.split(delimiter)):
            return delimiter
    return _DELIMITERS[0]


def _parquet_rows(table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a table of parquet: where it is, and its columns."""
    number = 0
    with readable(table):
        for batch in open_table(table).iter_batches(use_threads=False):
            for row in decode_rows(batch, table, number):
                yield f"{table} row {number}", row
                number += 1
