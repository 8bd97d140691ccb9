"""Tables in the layout of the Hugging Face hub: a column of images, `{bytes, path}`, and one of class numbers."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dumo.types import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

STREAMED = 64  # rows held at a time of a group that is too large: ours


def open_table(file: str | Path) -> "ParquetFile":
    """A table, its rows unread. Raises UserError where it is not whole."""
    from pyarrow import ArrowException  # slow to import
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file, memory_map=True, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is no whole parquet file: {error}; fetch it again, or remove it") from error


def image_column(file: str | Path, table: "ParquetFile") -> str:
    """The dotted name of the bytes. Of several columns of images, `image` is taken. Raises UserError without any."""
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


def read_group(table: "ParquetFile", group: int, column: str) -> Any:  # noqa: ANN401, an untyped array
    """The bytes in the rows of a group, with what `image_column` names. Raises OSError where it is damaged."""
    from pyarrow import ArrowException

    try:
        found = table.read_row_group(group, columns=[column], use_threads=False).column(0)
        return _bytes(found.combine_chunks(), column)
    except ArrowException as error:  # not all of them are OSError or ValueError
        raise OSError(f"row group {group} is damaged: {error}") from error


def read_row(table: "ParquetFile", group: int, column: str, row: int) -> Any:  # noqa: ANN401, an untyped scalar
    """The bytes in one row of a group too large to be held: the rows before it are read, a few at a time.

    Raises OSError where the group is damaged, or shorter.
    """
    from pyarrow import ArrowException

    try:
        for part in table.iter_batches(STREAMED, row_groups=[group], columns=[column], use_threads=False):
            if row < len(part):
                return _bytes(part.column(0), column)[row]
            row -= len(part)
    except ArrowException as error:
        raise OSError(f"row group {group} is damaged: {error}") from error
    raise OSError(f"row group {group} has fewer rows than the file says")


def footer(file: str | Path) -> bytes:
    """The end of a file, that says where its columns lie, how many values they have and how large they are."""
    with Path(file).open("rb") as opened:
        size = opened.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(max(0, size - 8 - length))
        return opened.read()


def _bytes(found: Any, column: str) -> Any:  # noqa: ANN401, untyped arrays
    return found.field("bytes") if column.endswith(".bytes") else found


def read_labels(file: str | Path, table: "ParquetFile", label: str) -> Tensor:
    """The class numbers in a column, (n,) of Long. Raises UserError where a row has none, or the file is damaged."""
    from pyarrow import ArrowException, types

    try:
        column = table.read(columns=[label], use_threads=False).column(0)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is damaged: {error}; fetch it again, or remove it") from error
    if not types.is_integer(column.type) or column.null_count:
        what = f"{column.null_count} empty rows" if column.null_count else f"the type {column.type}"
        raise UserError(f"column '{label}' of {file} has {what}, not a class number in each row: set data.label")
    return torch.tensor(column.to_numpy(), dtype=torch.long)


def read_texts(file: str | Path, table: "ParquetFile", name: str) -> list[Any]:
    """What a column holds, as Python has it. Raises UserError where the file lacks it, or is damaged."""
    from pyarrow import ArrowException

    if name not in table.schema_arrow.names:
        raise UserError(f"{file} has no column '{name}', other files have")
    try:
        return table.read(columns=[name], use_threads=False).column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is damaged: {error}; fetch it again, or remove it") from error


def class_names(table: "ParquetFile", label: str) -> list[str]:
    """The classes' names, where the hub's metadata tell them."""
    try:
        return json.loads(table.schema_arrow.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
