"""The log of a run: one JSON object a line, so that a torn write costs at most the last line.

JSON has no NaN and no infinity: they are written as null, such as the mean loss of a time bin that no row fell into.
"""

import json
from pathlib import Path
from typing import Any

from dumo.io import file
from dumo.io.json import finite
from dumo.types import UserError

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Add one line, and hand it to the operating system before returning."""
    with path.open("a") as log:
        log.write(line(row))


def read_log(path: Path) -> list[Row]:
    """All rows, in order; none where there is no file. A torn last line is left out.

    Raises UserError where any other line is no row with its step.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    rows: list[Row] = []
    for i, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            if not isinstance(row["step"], int):
                raise TypeError("its step is no number")
            rows.append(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if i < len(lines):
                raise UserError(f"{path}, line {i} is no row of a log ({error}): mend or remove that line") from error
    return rows


def rewind(path: Path, step: int) -> None:
    """Drop what was logged after `step`, and a torn last line, atomically: a resumed run logs those steps again."""
    if not path.exists():
        return
    kept = [row for row in read_log(path) if row["step"] <= step]
    file.write(path, "".join(map(line, kept)).encode(), writer="", durable=True)


def line(row: Row) -> str:
    """The row as a line of strict JSON."""
    return json.dumps(finite(row), allow_nan=False) + "\n"
