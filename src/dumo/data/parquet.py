"""Tables of images in the layout of the Hugging Face hub: a column `{bytes, path}`, one of class numbers, as a store.

A row group is the least that can be read at once, so rows are quick in their order and slow at random: a set too large
for the memory is better encoded once (or `data.memory` raised) than trained on from here. Groups that were read are
kept up to a number of bytes; of a larger one, the rows up to the wanted one are gone through, and none are kept.

`Parquet` is the store; below it are functions that read a table, its columns, groups and rows.
"""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dumo.data.pixel import Unreadable
from dumo.data.store import Labels, counted
from dumo.io import digest
from dumo.io.seen import Files, states_of
from dumo.types import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

KEPT_BYTES = 2**30  # of row groups: ours. The hub writes groups of 100 images
STREAMED = 64  # rows held at a time of a group that is too large: ours


class Parquet:
    """The rows of some tables, one after the other.

    `label` names the column of classes. Raises UserError for a file that is no whole table, or has no images.
    """

    def __init__(self, files: Sequence[str], *, label: str | None, kept_bytes: int = KEPT_BYTES) -> None:
        self.files = files
        self.kept_bytes = kept_bytes
        self.tables = [open_table(file) for file in files]
        self.columns = [image_column(file, table) for file, table in zip(files, self.tables, strict=True)]
        self.groups: list[tuple[int, int]] = []  # the file of each row group, and its number there
        group_rows: list[int] = []
        for k, table in enumerate(self.tables):
            for number in range(table.num_row_groups):
                self.groups.append((k, number))
                group_rows.append(table.metadata.row_group(number).num_rows)
        file_rows = [table.metadata.num_rows for table in self.tables]
        self.first_of_group = list(accumulate(group_rows, initial=0))  # row; at the end, that behind the last group
        self.first_of_file = list(accumulate(file_rows, initial=0))
        self.within = Files.of(files, states_of(files), file_rows)
        self.labels = None if label is None else self._labels(label)
        self.locks = [Lock() for _ in files]  # a table is read by one thread at a time
        self.kept: OrderedDict[int, Any] = OrderedDict()  # groups, the last used at the end
        self.keeping = Lock()

    def __len__(self) -> int:
        return self.first_of_group[-1]

    def fingerprint(self) -> str:
        """Of the files' names, sizes and footers."""
        names = (f"{os.path.basename(file)} {os.path.getsize(file)}" for file in self.files)
        return digest.short(*names, *(digest.of_bytes(footer(file)) for file in self.files))

    def path(self, i: int) -> str:
        """The file and the row in it, from 0."""
        file, _ = self.groups[self._group_of(i)]
        return f"{self.files[file]} row {i - self.first_of_file[file]}"

    def read(self, i: int) -> bytes:
        """The bytes in row i. Raises OSError or ValueError where there are none."""
        from pyarrow import ArrowException  # slow to import

        k = self._group_of(i)
        try:
            data = self._read_row(k, i - self.first_of_group[k]).as_py()
        except ArrowException as error:  # not all of them are OSError or ValueError
            _, number = self.groups[k]
            raise OSError(f"row group {number} is damaged: {error}") from error
        if data is None:
            raise Unreadable("holds no bytes of an image")
        return data

    def _group_of(self, i: int) -> int:
        """The row group that image i is in."""
        return bisect_right(self.first_of_group, i) - 1

    def _read_row(self, k: int, row: int) -> Any:  # noqa: ANN401, as `read_row`
        """The bytes in a row of group k, which is kept if it is not too large. Raises as `read_row`."""
        file, number = self.groups[k]
        table = self.tables[file]
        column = self.columns[file]
        with self.locks[file]:
            with self.keeping:
                group = self.kept.pop(k, None)
            if group is None:
                if table.metadata.row_group(number).total_byte_size > self.kept_bytes:
                    return read_row(table, number, column, row)
                group = read_group(table, number, column)
            self._keep(k, group)
        if row >= len(group):
            raise Unreadable("is not there: its file is damaged")
        return group[row]

    def _keep(self, k: int, group: Any) -> None:  # noqa: ANN401, as `read_group`
        """This group as the one last used, and of the others as many as there is room for."""
        with self.keeping:
            self.kept[k] = group
            while len(self.kept) > 1 and sum(kept.nbytes for kept in self.kept.values()) > self.kept_bytes:
                self.kept.popitem(last=False)

    def _labels(self, label: str) -> Labels | None:
        from pyarrow import types  # slow to import

        if not any(label in table.schema_arrow.names for table in self.tables):
            return None
        parts: list[Tensor] = []
        for file, column in zip(self.files, self.read_column(label), strict=True):
            if column.null_count:
                raise UserError(
                    f"column '{label}' of {file} has {column.null_count} empty rows, not a class number in each row: "
                    "set data.label"
                )
            if not types.is_integer(column.type):
                raise UserError(
                    f"column '{label}' of {file} has the type {column.type}, not a class number in each row: set "
                    "data.label"
                )
            parts.append(torch.tensor(column.to_numpy(), dtype=torch.long))
        return counted(torch.cat(parts), self.files[0], class_names(self.tables[0], label))

    def read_column(self, name: str) -> Iterator[Any]:
        """A column of each file, as arrow has it. Raises UserError where one lacks it, or is damaged."""
        for file, table in zip(self.files, self.tables, strict=True):
            if name not in table.schema_arrow.names:
                raise UserError(f"{file} has no column '{name}', other files have")
            with whole(file):
                column = table.read(columns=[name], use_threads=False).column(0)
            yield column

    def read_texts(self, name: str) -> list[Any]:
        """A column of all files, as Python's objects. Raises as `read_column`, and UserError for what is not UTF-8."""
        values: list[Any] = []
        for file, column in zip(self.files, self.read_column(name), strict=True):
            values += decoded(column, file, 0)
        return values


def columns(store: Parquet) -> list[str]:
    """What the first table has, for a message."""
    return list(store.tables[0].schema_arrow.names)


def columns_of_all(store: Parquet) -> list[str]:
    """The columns that every table has, in the order of the first."""
    others = [set(table.schema_arrow.names) for table in store.tables[1:]]
    return [name for name in columns(store) if all(name in names for names in others)]


def text_columns(store: Parquet) -> list[str]:
    """The columns of the first table that hold texts, or lists of texts."""
    from pyarrow import types  # slow to import

    names: list[str] = []
    for column in store.tables[0].schema_arrow:
        content = column.type.value_type if types.is_list(column.type) else column.type
        if types.is_string(content) or types.is_large_string(content):
            names.append(column.name)
    return names


def decoded(rows: Any, table: str, first: int) -> list[Any]:  # noqa: ANN401, untyped rows or a column of them
    """Rows of a table, or a column of them, as Python's objects; `first` is the number of the first.

    Raises UserError, with the row, where a text is not UTF-8.
    """
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(rows)):
            try:
                rows.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{table} row {first + number} has a text that is not UTF-8 (byte "
                    f"0x{error.object[error.start]:02x}): write the table anew, from texts in UTF-8"
                ) from error
        raise


def open_table(file: str | Path) -> "ParquetFile":
    """A table, its rows unread. Raises UserError where it is not whole."""
    from pyarrow.parquet import ParquetFile  # slow to import

    with whole(file, "is no whole parquet file"):
        return ParquetFile(file, memory_map=True, page_checksum_verification=True)


@contextmanager
def whole(file: str | Path, problem: str = "is damaged") -> Generator[None]:
    """Say of a file that it is not whole, where pyarrow cannot read it: UserError."""
    from pyarrow import ArrowException  # slow to import

    try:
        yield
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} {problem}: {error}; fetch it again, or remove it") from error


def image_column(file: str | Path, table: "ParquetFile") -> str:
    """The dotted name of the bytes. Of several columns of images, `image` is taken. Raises UserError without any."""
    from pyarrow import types

    bytes_of_column: dict[str, str] = {}  # dotted names
    for field in table.schema_arrow:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            bytes_of_column[field.name] = f"{field.name}.bytes"
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            bytes_of_column[field.name] = field.name
    if "image" in bytes_of_column:
        return bytes_of_column["image"]
    columns = ", ".join(table.schema_arrow.names)
    if not bytes_of_column:
        raise UserError(
            f"{file} has no column of images {{bytes, path}} (it has {columns}): rename the column to 'image'"
        )
    if len(bytes_of_column) > 1:
        raise UserError(
            f"{file} has several columns of bytes, none called 'image' (it has {columns}): rename the column to 'image'"
        )
    return next(iter(bytes_of_column.values()))


def read_group(table: "ParquetFile", group: int, column: str) -> Any:  # noqa: ANN401, an untyped array
    """The bytes in the rows of a group, with what `image_column` names. Raises ArrowException where it is damaged."""
    rows = table.read_row_group(group, columns=[column], use_threads=False).column(0)
    return _bytes(rows.combine_chunks(), column)


def read_row(table: "ParquetFile", group: int, column: str, row: int) -> Any:  # noqa: ANN401, an untyped scalar
    """The bytes in one row of a group too large to be held: the rows before it are read, a few at a time.

    Raises ArrowException where the group is damaged, OSError where it is shorter.
    """
    for part in table.iter_batches(STREAMED, row_groups=[group], columns=[column], use_threads=False):
        if row < len(part):
            return _bytes(part.column(0), column)[row]
        row -= len(part)
    raise OSError(f"row group {group} has fewer rows than the file says")


def footer(file: str | Path) -> bytes:
    """The end of a file, that says where its columns lie, how many values they have and how large they are."""
    with Path(file).open("rb") as opened:
        size = opened.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, size - 8 - length))
        return opened.read()


def _bytes(rows: Any, column: str) -> Any:  # noqa: ANN401, untyped arrays
    return rows.field("bytes") if column.endswith(".bytes") else rows


def class_names(table: "ParquetFile", label: str) -> list[str]:
    """The classes' names, where the hub's metadata have them."""
    try:
        return json.loads(table.schema_arrow.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
