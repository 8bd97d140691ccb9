"""Tables of images in the layout of the Hugging Face hub: a column of `{bytes, path}`, and one of class numbers.

`Parquet` is the store of the images in some tables: `read` gives the bytes of an image, `labels` the classes,
`read_texts` a column of texts, and `column_names` and its siblings what columns there are. `open_table`, `readable` and
`decode_rows` read any table of parquet, and `holds_images` says whether it may have images.

The order of events in `Parquet.read`:

1. Find the row group of the image. A row group is the least that can be read at once.
2. Take the group from the cache, or read it and cache it. The cache drops the groups that were not used for longest.
3. Of a group larger than the whole cache, read on to the wanted row (`RowStream`), and cache the rows before it that
   fit. A row before those is read from the group's start again.

So rows are quick in their order and slow at random. A set too large for the memory is better encoded once, or
`data.memory` raised, than trained on from here.
"""

import errno
import json
import os
from bisect import bisect_right
from collections import OrderedDict, deque
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
    from pyarrow.parquet import FileMetaData, ParquetFile

_CACHE_BYTES = 2**30  # of row groups: ours. The hub writes groups of 100 images
_TAIL_BYTES = 8  # at the end of every file: the length of the footer before them, in 4 bytes, and "PAR1" (parquet)
BATCH_ROWS = 64  # rows read at a time of a row group that is too large to cache: ours
_MIN_KEPT_BATCHES = 2  # of such a group, however large: ours. Threads ask for rows in nearly their order
_MAX_OPEN_TABLES = 128  # at a time: ours. Systems allow a process 256 files, or 1,024
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)  # are open, in this process or on the machine
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
        self.metadata: list[FileMetaData] = []  # by file
        self.schemas: list[Any] = []  # of arrow, untyped, by file
        for file in files:
            table = open_table(file)
            self.metadata.append(table.metadata)
            self.schemas.append(table.schema_arrow)
        self.image_columns = [_image_column(file, schema) for file, schema in zip(files, self.schemas, strict=True)]
        self.row_groups: list[RowGroup] = []
        self.num_images = 0
        for file_index, metadata in enumerate(self.metadata):
            for number in range(metadata.num_row_groups):
                self.row_groups.append(RowGroup(file_index, number, self.num_images))
                self.num_images += metadata.row_group(number).num_rows
        rows_by_file = [metadata.num_rows for metadata in self.metadata]
        self.first_images = list(accumulate(rows_by_file, initial=0))  # of each file
        self.item_files = ItemFiles.of(files, states_of(files), rows_by_file)
        self.table_locks = [Lock() for _ in files]  # a table is read by one thread at a time
        self.open_tables: OrderedDict[int, ParquetFile] = OrderedDict()  # by file; the last used at the end
        # arrays of bytes, and streams of groups that are too large; the last used at the end
        self.group_cache: OrderedDict[RowGroup, Any] = OrderedDict()
        self.cache_lock = Lock()  # of both
        self.labels = None if label is None else self._read_labels(label)

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
        for file_index, file in enumerate(self.files):
            if name not in self.schemas[file_index].names:
                raise UserError(f"{file} has no column '{name}', other files have")
            with readable(file):
                column = self._table(file_index).read(columns=[name], use_threads=False).column(0)
            yield column

    def read_texts(self, name: str) -> list[Any]:
        """A column of all files, as Python's objects. Raises UserError where a file lacks it, or it is not UTF-8."""
        values: list[Any] = []
        for file, column in zip(self.files, self.read_column(name), strict=True):
            values += decode_rows(column, file, 0)
        return values

    def column_names(self) -> list[str]:
        """The names of the first table's columns, in their order."""
        return list(self.schemas[0].names)

    def shared_column_names(self) -> list[str]:
        """The names of the columns that every table has, in the order of the first table."""
        shared = set(self.column_names())
        for schema in self.schemas[1:]:
            shared &= set(schema.names)
        return [name for name in self.column_names() if name in shared]

    def text_column_names(self) -> list[str]:
        """The names of the first table's columns that hold texts, or lists of texts."""
        from pyarrow import types  # slow to import

        names: list[str] = []
        for column in self.schemas[0]:
            content = column.type.value_type if types.is_list(column.type) else column.type
            if types.is_string(content) or types.is_large_string(content):
                names.append(column.name)
        return names

    def integer_column_names(self) -> list[str]:
        """The names of the first table's columns that hold whole numbers."""
        from pyarrow import types  # slow to import

        return [column.name for column in self.schemas[0] if types.is_integer(column.type)]

    def _table(self, file_index: int) -> "ParquetFile":
        """The table of a file, which stays open while it is among the last used. Raises UserError as `open_table`."""
        with self.cache_lock:
            table = self.open_tables.pop(file_index, None)
            if table is None:
                table = open_table(self.files[file_index], self.metadata[file_index])
            self.open_tables[file_index] = table
            if len(self.open_tables) > _MAX_OPEN_TABLES:
                self.open_tables.popitem(last=False)  # who still reads from it has it open
        return table

    def _group_of(self, i: int) -> RowGroup:
        """The row group of image i."""
        return self.row_groups[bisect_right(self.row_groups, i, key=attrgetter("first_image")) - 1]

    def _read_row(self, group: RowGroup, row: int) -> Any:  # noqa: ANN401, an untyped scalar
        """The bytes in a row of a row group, which is cached, or the part of it that is not too large.

        Raises ArrowException where the group is damaged, Unreadable where it has fewer rows than its file says.
        """
        column = self.image_columns[group.file_index]
        with self.table_locks[group.file_index]:
            with self.cache_lock:
                images = self.group_cache.pop(group, None)
            if images is None:
                table = self._table(group.file_index)
                if self.metadata[group.file_index].row_group(group.number).total_byte_size > self.cache_bytes:
                    images = RowStream(table, group.number, column, self.cache_bytes)
                else:
                    images = _read_group(table, group.number, column)
            image = images.read(row) if isinstance(images, RowStream) else _row_of(images, row)
            self._cache(group, images)
        return image

    def _cache(self, group: RowGroup, images: Any) -> None:  # noqa: ANN401, an untyped array
        """Cache a row group as the last used, and drop the least recently used ones where the cache is full."""
        with self.cache_lock:
            self.group_cache[group] = images
            while len(self.group_cache) > 1 and self._cached_bytes() > self.cache_bytes:
                self.group_cache.popitem(last=False)

    def _cached_bytes(self) -> int:
        """The bytes of all cached row groups, and parts of row groups."""
        return sum(images.nbytes for images in self.group_cache.values())

    def _read_labels(self, label: str) -> Labels | None:
        """Read the classes in a column; None: no file has it. Raises UserError for a row without a class number."""
        from pyarrow import types  # slow to import

        if not any(label in schema.names for schema in self.schemas):
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
        return count_classes(torch.cat(classes), self.files[0], _class_names(self.schemas[0], label))


class RowStream:
    """The bytes in the rows of a row group that is too large to hold, read on to each row that is asked for.

    The last batches are kept, up to some bytes, for threads that are a little behind. It is read by one thread at a
    time.
    """

    def __init__(self, table: "ParquetFile", number: int, column: str, max_bytes: int) -> None:
        """Read nothing yet of row group `number`. `column` is the dotted name of the images' bytes."""
        self.table = table
        self.number = number
        self.column = column
        self.max_bytes = max_bytes
        self._restart()

    def _restart(self) -> None:
        """Begin again at the first row."""
        columns = [self.column]
        self.batches = self.table.iter_batches(BATCH_ROWS, row_groups=[self.number], columns=columns, use_threads=False)
        self.next_row = 0
        self.kept: deque[tuple[int, Any]] = deque()  # the last batches, each with the number of its first row
        self.nbytes = 0  # of these

    def read(self, row: int) -> Any:  # noqa: ANN401, an untyped scalar
        """The bytes in a row.

        Raises ArrowException where the row group is damaged, Unreadable where it has fewer rows than its file says.
        """
        if self.kept and row < self.kept[0][0]:
            self._restart()
        while row >= self.next_row:
            self._read_batch()
        for first_row, images in reversed(self.kept):
            if row >= first_row:
                return images[row - first_row]
        raise Unreadable(_MISSING_ROW)  # of an empty batch

    def _read_batch(self) -> None:
        """Read the next batch, and drop the first ones where they are too large together."""
        batch = next(self.batches, None)
        if batch is None:
            raise Unreadable(_MISSING_ROW)
        images = _bytes_of(batch.column(0), self.column)
        self.kept.append((self.next_row, images))
        self.next_row += len(images)
        self.nbytes += images.nbytes
        while len(self.kept) > _MIN_KEPT_BATCHES and self.nbytes > self.max_bytes:
            _, dropped = self.kept.popleft()
            self.nbytes -= dropped.nbytes


def open_table(file: str | Path, metadata: "FileMetaData | None" = None) -> "ParquetFile":
    """A table, its rows unread. `metadata`: what its footer says, where it was read.

    Raises UserError where it is not whole.
    """
    from pyarrow.parquet import ParquetFile  # slow to import

    with readable(file, "is no whole parquet file"):
        return ParquetFile(file, metadata=metadata, memory_map=True, page_checksum_verification=True)


def holds_images(file: str | Path) -> bool:
    """Whether a table has a column of bytes, which may be images. Raises UserError where it is not whole."""
    return bool(_byte_columns(open_table(file).schema_arrow))


@contextmanager
def readable(file: str | Path, problem: str = "is damaged") -> Generator[None]:
    """Raise UserError, with the file and the problem, where pyarrow cannot read the file inside.

    Raises OSError as it is where too many files are open.
    """
    from pyarrow import ArrowException  # slow to import

    try:
        yield
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno in _TOO_MANY_FILES:
            raise
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


def _row_of(images: Any, row: int) -> Any:  # noqa: ANN401, an untyped array and scalar
    """The bytes in a row of a row group. Raises Unreadable where it has fewer rows than its file says."""
    if row >= len(images):
        raise Unreadable(_MISSING_ROW)
    return images[row]


def _bytes_of(rows: Any, column: str) -> Any:  # noqa: ANN401, untyped arrays
    """The bytes in rows of the column with this dotted name, which are bytes or structs of them."""
    return rows.field("bytes") if column.endswith(".bytes") else rows


def _byte_columns(schema: Any) -> dict[str, str]:  # noqa: ANN401, an untyped schema
    """The dotted names of bytes, `image.bytes`, by the columns that hold them, or structs of them."""
    from pyarrow import types  # slow to import

    dotted_names: dict[str, str] = {}
    for field in schema:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            dotted_names[field.name] = f"{field.name}.bytes"
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            dotted_names[field.name] = field.name
    return dotted_names


def _image_column(file: str | Path, schema: Any) -> str:  # noqa: ANN401, an untyped schema
    """The dotted name of the images' bytes, `image.bytes`; of several columns of bytes, `image` is taken.

    Raises UserError where there is no such column.
    """
    dotted_names = _byte_columns(schema)
    if "image" in dotted_names:
        return dotted_names["image"]
    available = ", ".join(schema.names)
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


def _class_names(schema: Any, label: str) -> list[str]:  # noqa: ANN401, an untyped schema
    """The names of the classes in a column, from the hub's metadata; [] where they are not there."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []


def _read_footer(file: str | Path) -> bytes:
    """Read the end of a file, which says where its columns lie, how many values they have and how large they are."""
    with Path(file).open("rb") as stream:
        footer_end = stream.seek(-_TAIL_BYTES, os.SEEK_END)
        footer_bytes = int.from_bytes(stream.read(4), "little")
        stream.seek(max(0, footer_end - footer_bytes))
        return stream.read()
