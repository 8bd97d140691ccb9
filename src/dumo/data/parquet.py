"""Tables of images in the layout of the Hugging Face hub (`dumo.io.parquet`), as a store.

A row group is the least that can be read, so rows are quick in their order and slow at random: a set too large for the
memory is better encoded once (or `data.memory` raised) than trained on from here.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import torch

from dumo.data.pixel import Unreadable
from dumo.data.store import Labels, counted
from dumo.io.parquet import class_names, image_column, open_table, read_group, read_labels
from dumo.types import UserError

GROUPS = 8  # row groups kept: as many as the threads that read in order work on


class Parquet:
    """The rows of some tables, one after the other.

    `label` names the column of classes. Raises UserError for a file that is no whole table, or has no images.
    """

    def __init__(self, files: Sequence[str], *, label: str | None) -> None:
        self.files = files
        self.tables = [open_table(file) for file in files]
        self.columns = [image_column(file, table) for file, table in zip(files, self.tables, strict=True)]
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

    def _group(self, k: int) -> Any:  # noqa: ANN401, as `read_group`
        file, group = self.places[k]
        return read_group(self.tables[file], group, self.columns[file])

    def _labels(self, label: str) -> Labels | None:
        having = [label in table.schema_arrow.names for table in self.tables]
        if not any(having):
            return None
        if not all(having):
            raise UserError(f"{self.files[having.index(False)]} has no column '{label}', other files have")
        c = torch.cat([read_labels(file, table, label) for file, table in zip(self.files, self.tables, strict=True)])
        return counted(c, self.files[0], class_names(self.tables[0], label))


def columns(store: Parquet) -> list[str]:
    """What the first table has, for a message."""
    return list(store.tables[0].schema_arrow.names)
