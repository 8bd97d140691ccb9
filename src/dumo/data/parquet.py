"""Tables of images in the layout of the Hugging Face hub (`dumo.io.parquet`), as a store.

A row group is the least that can be read at once, so rows are quick in their order and slow at random: a set too large
for the memory is better encoded once (or `data.memory` raised) than trained on from here. Groups that were read are
kept up to so many bytes; of one that is larger, the rows up to the one asked for are gone through, and none are kept.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch

from dumo.data.pixel import Unreadable
from dumo.data.store import Labels, counted
from dumo.io import digest
from dumo.io.parquet import class_names, footer, image_column, open_table, read_group, read_labels, read_row
from dumo.types import UserError

KEPT = 2**30  # bytes of row groups: ours. The hub writes groups of 100 images


class Parquet:
    """The rows of some tables, one after the other.

    `label` names the column of classes. Raises UserError for a file that is no whole table, or has no images.
    """

    def __init__(self, files: Sequence[str], *, label: str | None, kept: int = KEPT) -> None:
        self.files, self.most = files, kept
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
        self.locks = [Lock() for _ in files]  # a table is read by one thread at a time
        self.kept: OrderedDict[int, Any] = OrderedDict()  # groups, the last used at the end
        self.keeping = Lock()

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        """Of the files' names, sizes and footers."""
        names = (f"{os.path.basename(file)} {os.path.getsize(file)}" for file in self.files)
        return digest.short(*names, *(digest.of_bytes(footer(file)) for file in self.files))

    def path(self, i: int) -> str:
        """The file and the row in it, from 0."""
        file, _ = self.places[self._place(i)]
        return f"{self.files[file]} row {i - self.firsts[file]}"

    def read(self, i: int) -> bytes:
        """The bytes in row i. Raises OSError or ValueError where there are none."""
        k = self._place(i)
        data = self._row(k, i - self.starts[k]).as_py()
        if data is None:
            raise Unreadable("holds no bytes of an image")
        return data

    def _place(self, i: int) -> int:
        return bisect_right(self.starts, i) - 1

    def _row(self, k: int, row: int) -> Any:  # noqa: ANN401, as `read_row`
        file, number = self.places[k]
        table, column = self.tables[file], self.columns[file]
        with self.locks[file]:
            with self.keeping:
                group = self.kept.pop(k, None)
            if group is None:
                if table.metadata.row_group(number).total_byte_size > self.most:
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
            while sum(kept.nbytes for kept in self.kept.values()) > self.most and len(self.kept) > 1:
                self.kept.popitem(last=False)

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
