"""Tables of images in the layout of the Hugging Face hub: a column of `{bytes, path}` and one of class numbers.

A row group is the least that can be read, so rows are quick in their order and slow at random: a set too large for the
memory is better encoded once (or `data.memory` raised) than trained on from here.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dumo.data.pixel import Unreadable
from dumo.data.store import Labels, counted
from dumo.types import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

GROUPS = 8  # row groups kept: as many as the threads that read in order work on


class Parquet:
    """The rows of some tables, one after the other.

    `label` names the column of classes. Raises UserError for a file that is no whole table, or has no images.
    """

    def __init__(self, files: Sequence[str], *, label: str | None) -> None:
        self.files = files
        self.tables = [_opened(file) for file in files]
        self.columns = [_image_column(file, table) for file, table in zip(files, self.tables, strict=True)]
        self.places: list[tuple[int, int]] = []  # (file, row group)
        self.starts: list[int] = []  # the first row of each
        self.firsts: list[int] = []  # the first row of each file
        self.size = 0
        for i, table in enumerate(self.tables):
            self.firsts.append(self.size)
            for group in range(table.num_row_groups):
                self.places.append((i, group))
                self.starts.append(self.size)
                self.size += table.metadata.row_group(group).num_rows
        self.labels = None if label is None else self._labels(label)
        self.lock = Lock()  # a table is read by one thread at a time
        self.group = lru_cache(maxsize=GROUPS)(self._group)

    def __len__(self) -> int:
        return self.size

    def path(self, i: int) -> str:
        """The file and the row in it, from 0."""
        file, _ = self.places[self._place(i)]
        return f"{self.files[file]} row {i - self.firsts[file]}"

    def read(self, i: int) -> bytes:
        """The bytes in row i. Raises OSError or ValueError where there are none."""
        k = self._place(i)
        with self.lock:
            data = self.group(k)[i - self.starts[k]].as_py()
        if data is None:
            raise Unreadable("holds no bytes of an image")
        return data

    def _place(self, i: int) -> int:
        return bisect_right(self.starts, i) - 1

    def _group(self, k: int) -> Any:  # noqa: ANN401, an array of pyarrow, which is not typed
        file, group = self.places[k]
        name = self.columns[file]
        column = self.tables[file].read_row_group(group, columns=[name], use_threads=False).column(0).combine_chunks()
        return column.field("bytes") if name.endswith(".bytes") else column

    def _labels(self, label: str) -> Labels | None:
        having = [label in table.schema_arrow.names for table in self.tables]
        if not any(having):
            return None
        if not all(having):
            raise UserError(f"{self.files[having.index(False)]} has no column '{label}', other files have")
        c = torch.cat([_column(file, table, label) for file, table in zip(self.files, self.tables, strict=True)])
        return counted(c, self.files[0], _names(self.tables[0], label))


def columns(store: Parquet) -> list[str]:
    """What the first table has, for a message."""
    return list(store.tables[0].schema_arrow.names)


def _opened(file: str) -> "ParquetFile":
    from pyarrow import ArrowException  # slow to import
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file, memory_map=True)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is no whole parquet file: {error}; fetch it again, or remove it") from error


def _image_column(file: str, table: "ParquetFile") -> str:
    """The dotted name of the bytes. Of several columns of images, `image` is taken."""
    from pyarrow import types

    found: dict[str, str] = {}
    for field in table.schema_arrow:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            found[field.name] = f"{field.name}.bytes"
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            found[field.name] = field.name
    name = "image" if "image" in found else next(iter(found), None)
    if name is None or (len(found) > 1 and name != "image"):
        has = ", ".join(table.schema_arrow.names)
        wrong = "several columns of bytes, none called 'image'" if found else "no column of images {bytes, path}"
        raise UserError(f"{file} has {wrong} (it has {has}): rename the column to 'image'")
    return found[name]


def _column(file: str, table: "ParquetFile", label: str) -> Tensor:
    from pyarrow import ArrowException, types

    try:
        column = table.read(columns=[label], use_threads=False).column(0)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is damaged: {error}; fetch it again, or remove it") from error
    if not types.is_integer(column.type) or column.null_count:
        what = f"{column.null_count} empty rows" if column.null_count else f"the type {column.type}"
        raise UserError(f"column '{label}' of {file} has {what}, not a class number in each row: set data.label")
    return torch.tensor(column.to_numpy(), dtype=torch.long)


def _names(table: "ParquetFile", label: str) -> list[str]:
    """The classes' names, where the hub's metadata tell them."""
    try:
        return json.loads(table.schema_arrow.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
