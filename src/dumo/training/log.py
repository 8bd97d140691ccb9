"""A run's logs, metrics.jsonl and speed.jsonl: one JSON object per line, so a torn write loses at most the last line.

Training calls `append` at each logged step, and `flush` before a checkpoint, which records the size and hash of the log
(`entry_of`). A resumed run removes the rows after its step (`rewind`). All other code reads with `read_log`, and
displays use `is_weighted` to decide whether to show the parts of the loss.

NaN and infinity, such as the mean loss of an empty time bin, are written as null.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dumo.io import file
from dumo.io.guard import require_in_place
from dumo.io.read import null_nonfinite
from dumo.training.checkpoint import FileEntry
from dumo.types import UserError

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Remove a torn last line, and append a row. It is not flushed to disk.

    Raise UserError if the folder was moved (`require_in_place`).
    """
    require_in_place(path)
    with path.open("a+b") as lines:
        _drop_torn_line(lines)
        lines.write(to_line(row).encode())


def _drop_torn_line(lines: BinaryIO) -> None:
    """Truncate an incomplete last line, which a killed training may leave."""
    size = lines.seek(0, os.SEEK_END)
    lines.seek(max(0, size - 1))
    if lines.read() not in (b"", b"\n"):
        lines.seek(0)
        lines.truncate(lines.read().rfind(b"\n") + 1)


def flush(path: Path) -> None:
    """Flush the log to disk."""
    if path.exists():
        file.flush(path)
        file.flush(path.parent)


def entry_of(path: Path) -> FileEntry | None:
    """Return the size and SHA-256 of a log for a checkpoint; None if there is no log."""
    return FileEntry.of(path) if path.exists() else None


def read_log(path: Path) -> list[Row]:
    """Read all rows in order; [] if the file does not exist. An invalid last line, left by a torn write, is skipped.

    Raise UserError if any other line is invalid.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows: list[Row] = []
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text.decode("utf-8"))
            if not isinstance(row["step"], int):
                raise TypeError("its step is not a number")
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                continue
            raise UserError(
                f"{path}, line {number} is not a valid log row ({error}): fix or remove that line"
            ) from error
    return rows


def is_weighted(loss: float | None, parts: Mapping[str, float | None]) -> bool:
    """Whether a loss differs from its parts: it has several, or a single one with another value.

    Parts are mean squares; a loss that is weighted by its own size may be constant.
    """
    return bool(parts) and list(parts.values()) != [loss]


def rewind(path: Path, step: int) -> None:
    """Remove the rows after `step`, which a resumed run logs again, and a torn last line."""
    if path.exists():
        text = "".join(to_line(row) for row in read_log(path) if row["step"] <= step)
        # Only one process writes the log, so the temporary file needs no unique name.
        file.write(path, text.encode(), writer="", durable=True)


def to_line(row: Row) -> str:
    """Format a row as a line of strict JSON."""
    return json.dumps(null_nonfinite(row), allow_nan=False) + "\n"
