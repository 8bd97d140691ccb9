"""Tables of images in the layout of the Hugging Face hub: a column of `{bytes, path}`, and one of class numbers.

`Parquet` is the store of the images in some tables: `read` gives the bytes of an image, `labels` the classes,
`read_texts` a column of texts, and `column_names` and its siblings what columns there are. `open_table`, `readable` and
`decode_rows` read any table of parquet.

The order of events in `Parquet.read`:

1. Find the row group of the image. A row group is the least that can be read at once.
2. Take the group from the cache, or read it and cache it. The cache drops the groups that were not used for longest.
3. Of a group larger than the whole cache, read up to the wanted row, and cache nothing.

So rows are quick in their order and slow at random. A set too large for the memory is better encoded once, or
`data.memory` raised, than trained on from here.
"""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dumo.data.pixel import Unreadable
from dumo.data.store import Labels, count_classes
from dumo.io import digest
from dumo.io.inventory import ItemFiles, states_of
from dumo.types import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_CACHE_BYTES = 2**30  # of row groups: ours. The hub writes groups of 100 images
_TAIL_BYTES = 8  # at the end of every file: the length of the footer before them, in 4 bytes, and "PAR1" (parquet)
BATCH_ROWS = 64  # rows held at a time of a row group that is too large to cache: ours
_MISSING_ROW = "is not there: its file is damaged"  # of a row group with fewer rows than its file says


class RowGroup(NamedTuple):
    """Where a row group lies."""

    file_index: int  # in `Parquet.files`
    number: int  # of the group in its file, from 0
    first_image: int  # the image in its first row


class Parquet:
    """The images in the rows of some tables, one table after the other. Image i is row i of all tables together.

    `label` names the column of classes. Raises UserError for a file that is no whole table, or has no images.
    """

    def __init__(self, files: Sequence[str], *, label: str | None, cache_bytes: int = _CACHE_BYTES) -> None:
        self.files = files
        self.cache_bytes = cache_bytes
        self.tables = [open_table(file) for file in files]
        self.image_columns = [_image_column(file, table) for file, table in zip(files, self.tables, strict=True)]
        self.row_groups: list[RowGroup] = []
        self.num_images = 0
        for file_index, table in enumerate(self.tables):
            for number in range(table.num_row_groups):
                self.row_groups.append(RowGroup(file_index, number, self.num_images))
                self.num_images += table.metadata.row_group(number).num_rows
        rows_by_file = [table.metadata.num_rows for table in self.tables]
        self.first_images = list(accumulate(rows_by_file, initial=0))  # of each file
        self.item_files = ItemFiles.of(files, states_of(files), rows_by_file)
        self.labels = None if label is None else self._read_labels(label)
        self.table_locks = [Lock() for _ in files]  # a table is read by one thread at a time
        self.group_cache: OrderedDict[RowGroup, Any] = OrderedDict()  # arrays of bytes; the last used at the end
        self.cache_lock = Lock()

    def __len__(self) -> int:
        return self.num_images

    def fingerprint(self) -> str:
        """A digest of the files' names, sizes and footers."""
        names_and_sizes = [f"{os.path.basename(file)} {os.path.getsize(file)}" for file in self.files]
        footers = [digest.of_bytes(_read_footer(file)) for file in self.files]
        return digest.short(*names_and_sizes, *footers)

    def path(self, i: int) -> str:
        """What to call image i: its file, and its row there, from 0."""
        file_index = self._group_of(i).file_index
        return f"{self.files[file_index]} row {i - self.first_images[file_index]}"

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError where its row group is damaged, Unreadable where it has no bytes."""
        from pyarrow import ArrowException  # slow to import

        group = self._group_of(i)
        try:
            data = self._read_row(group, i - group.first_image).as_py()
        except ArrowException as error:  # not all of them are OSError or ValueError
            raise OSError(f"row group {group.number} is damaged: {error}") from error
        if data is None:
            raise Unreadable("holds no bytes of an image")
        return data

    def read_column(self, name: str) -> Iterator[Any]:
        """The arrow column of this name in each file. Raises UserError where a file lacks it, or is damaged."""
        for file, table in zip(self.files, self.tables, strict=True):
            if name not in table.schema_arrow.names:
                raise UserError(f"{file} has no column '{name}', other files have")
            with readable(file):
                column = table.read(columns=[name], use_threads=False).column(0)
            yield column

    def read_texts(self, name: str) -> list[Any]:
        """A column of all files, as Python's objects. Raises UserError where a file lacks it, or it is not UTF-8."""
        values: list[Any] = []
        for file, column in zip(self.files, self.read_column(name), strict=True):
            values += decode_rows(column, file, 0)
        return values

    def column_names(self) -> list[str]:
        """The names of the first table's columns, in their order."""
        return list(self.tables[0].schema_arrow.names)

    def shared_column_names(self) -> list[str]:
        """The names of the columns that every table has, in the order of the first table."""
        shared = set(self.column_names())
        for table in self.tables[1:]:
            shared &= set(table.schema_arrow.names)
        return [name for name in self.column_names() if name in shared]

    def text_column_names(self) -> list[str]:
        """The names of the first table's columns that hold texts, or lists of texts."""
        from pyarrow import types  # slow to import

        names: list[str] = []
        for column in self.tables[0].schema_arrow:
            content = column.type.value_type if types.is_list(column.type) else column.type
            if types.is_string(content) or types.is_large_string(content):
                names.append(column.name)
        return names

    def _group_of(self, i: int) -> RowGroup:
        """The row group of image i."""
        return self.row_groups[bisect_right(self.row_groups, i, key=attrgetter("first_image")) - 1]

    def _read_row(self, group: RowGroup, row: int) -> Any:  # noqa: ANN401, an untyped scalar
        """The bytes in a row of a row group, which is cached if it is not too large.

        Raises ArrowException where the group is damaged, Unreadable where it has fewer rows than its file says.
        """
        table = self.tables[group.file_index]
        column = self.image_columns[group.file_index]
        with self.table_locks[group.file_index]:
            with self.cache_lock:
                images = self.group_cache.pop(group, None)
            if images is None:
                if table.metadata.row_group(group.number).total_byte_size > self.cache_bytes:
                    return _stream_to_row(table, group.number, column, row)
                images = _read_group(table, group.number, column)
            self._cache(group, images)
        if row >= len(images):
            raise Unreadable(_MISSING_ROW)
        return images[row]

    def _cache(self, group: RowGroup, images: Any) -> None:  # noqa: ANN401, an untyped array
        """Cache a row group as the last used, and drop the least recently used ones where the cache is full."""
        with self.cache_lock:
            self.group_cache[group] = images
            while len(self.group_cache) > 1 and self._cached_bytes() > self.cache_bytes:
                self.group_cache.popitem(last=False)

    def _cached_bytes(self) -> int:
        """The bytes of all cached row groups."""
        return sum(images.nbytes for images in self.group_cache.values())

    def _read_labels(self, label: str) -> Labels | None:
        """Read the classes in a column; None: no file has it. Raises UserError for a row without a class number."""
        from pyarrow import types  # slow to import

        if not any(label in table.schema_arrow.names for table in self.tables):
            return None
        classes: list[Tensor] = []  # of the rows of each file
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
            classes.append(torch.tensor(column.to_numpy(), dtype=torch.long))
        return count_classes(torch.cat(classes), self.files[0], _class_names(self.tables[0], label))


def open_table(file: str | Path) -> "ParquetFile":
    """A table, its rows unread. Raises UserError where it is not whole."""
    from pyarrow.parquet import ParquetFile  # slow to import

    with readable(file, "is no whole parquet file"):
        return ParquetFile(file, memory_map=True, page_checksum_verification=True)


@contextmanager
def readable(file: str | Path, problem: str = "is damaged") -> Generator[None]:
    """Raise UserError, with the file and the problem, where pyarrow cannot read the file inside."""
    from pyarrow import ArrowException  # slow to import

    try:
        yield
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} {problem}: {error}; fetch it again, or remove it") from error


def decode_rows(rows: Any, table: str, first: int) -> list[Any]:  # noqa: ANN401, untyped rows or a column of them
    """Rows of a table, or a column of them, as Python's objects; `first` is the number of the first row.

    Raises UserError, with the table and the row, where a text is not UTF-8.
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


def _read_group(table: "ParquetFile", number: int, column: str) -> Any:  # noqa: ANN401, an untyped array
    """Read the bytes in all rows of row group `number`. Raises ArrowException where it is damaged.

    `column` is the dotted name of the images' bytes.
    """
    rows = table.read_row_group(number, columns=[column], use_threads=False).column(0)
    return _bytes_of(rows.combine_chunks(), column)


def _stream_to_row(table: "ParquetFile", number: int, column: str, row: int) -> Any:  # noqa: ANN401, an untyped scalar
    """Read the bytes in one row of row group `number`, which is too large to hold, BATCH_ROWS rows at a time.

    `column` is the dotted name of the images' bytes. Raises ArrowException where the row group is damaged, Unreadable
    where it has fewer rows than its file says.
    """
    first_row = 0  # of the batch
    for batch in table.iter_batches(BATCH_ROWS, row_groups=[number], columns=[column], use_threads=False):
        if row < first_row + len(batch):
            return _bytes_of(batch.column(0), column)[row - first_row]
        first_row += len(batch)
    raise Unreadable(_MISSING_ROW)


def _bytes_of(rows: Any, column: str) -> Any:  # noqa: ANN401, untyped arrays
    """The bytes in rows of the column with this dotted name, which are bytes or structs of them."""
    return rows.field("bytes") if column.endswith(".bytes") else rows


def _image_column(file: str | Path, table: "ParquetFile") -> str:
    """The dotted name of the images' bytes, `image.bytes`; of several columns of bytes, `image` is taken.

    Raises UserError where there is no such column.
    """
    from pyarrow import types  # slow to import

    dotted_names: dict[str, str] = {}  # of bytes, by column
    for field in table.schema_arrow:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            dotted_names[field.name] = f"{field.name}.bytes"
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            dotted_names[field.name] = field.name
    if "image" in dotted_names:
        return dotted_names["image"]
    available = ", ".join(table.schema_arrow.names)
    if not dotted_names:
        raise UserError(
            f"{file} has no column of images {{bytes, path}} (it has {available}): rename the column to 'image'"
        )
    if len(dotted_names) > 1:
        raise UserError(
            f"{file} has several columns of bytes, none called 'image' (it has {available}): rename the column to "
            "'image'"
        )
    return next(iter(dotted_names.values()))


def _class_names(table: "ParquetFile", label: str) -> list[str]:
    """The names of the classes in a column, from the hub's metadata; [] where they are not there."""
    try:
        return json.loads(table.schema_arrow.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []


def _read_footer(file: str | Path) -> bytes:
    """Read the end of a file, which says where its columns lie, how many values they have and how large they are."""
    with Path(file).open("rb") as stream:
        footer_end = stream.seek(-_TAIL_BYTES, os.SEEK_END)
        footer_bytes = int.from_bytes(stream.read(4), "little")
        stream.seek(max(0, footer_end - footer_bytes))
        return stream.read()
