"""A run's log, metrics.jsonl and speed.jsonl: one JSON object per line, so a torn write costs at most the last line.

Training calls `append` at each logged step, and `flush` before a checkpoint, which notes the size and hash of the log
(`entry_of`). A resumed run removes the rows after its step (`rewind`).
Everyone else reads by `read_log`. Who shows a row asks `is_weighted` whether its loss says more than its parts.

JSON has no NaN and no infinity: they are written as null, such as the mean loss of an empty time bin.
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
    """Append one line, and cut off a torn one before it; it is with the operating system on return.

    Raises UserError as `require_in_place`.
    """
    require_in_place(path)
    with path.open("a+b") as lines:
        _drop_torn_line(lines)
        lines.write(to_line(row).encode())


def _drop_torn_line(lines: BinaryIO) -> None:
    """Cut off what follows the last line's end, which a training leaves that is killed while it writes."""
    size = lines.seek(0, os.SEEK_END)
    lines.seek(max(0, size - 1))
    if lines.read() not in (b"", b"\n"):
        lines.seek(0)
        lines.truncate(lines.read().rfind(b"\n") + 1)


def flush(path: Path) -> None:
    """Wait until the log is on the disk."""
    if path.exists():
        file.flush(path)
        file.flush(path.parent)


def entry_of(path: Path) -> FileEntry | None:
    """The size and the SHA-256 of a log, as a checkpoint lists them; None where there is no log."""
    return FileEntry.of(path) if path.exists() else None


def read_log(path: Path) -> list[Row]:
    """All rows, in order; none without a file. A last line that is no row is left out, as a torn write leaves one.

    Raises UserError if any other line is not a row with its step.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows: list[Row] = []
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text.decode("utf-8"))
            if not isinstance(row["step"], int):
                raise TypeError("its step is no number")
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # no text, no JSON, or no row
            if number == len(lines):
                continue
            raise UserError(f"{path}, line {number} is no row of a log ({error}): mend or remove that line") from error
    return rows


def is_weighted(loss: float | None, parts: Mapping[str, float | None]) -> bool:
    """Whether a loss says something else than its parts: there are several, or its only part is another number.

    Parts are mean squares; a loss that is weighted by its own size may be constant.
    """
    return bool(parts) and list(parts.values()) != [loss]


def rewind(path: Path, step: int) -> None:
    """Remove the rows after `step`, which a resumed run logs again, and a torn last line."""
    if path.exists():
        text = "".join(to_line(row) for row in read_log(path) if row["step"] <= step)
        # Only one process writes it, so its draft needs no own name.
        file.write(path, text.encode(), writer="", durable=True)


def to_line(row: Row) -> str:
    """A row as a line of strict JSON."""
    return json.dumps(null_nonfinite(row), allow_nan=False) + "\n"
