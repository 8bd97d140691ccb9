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
RENAMED = {"beyond": "clipped_share", "apart": "head_gap"}  # notes of runs of format 1 (`dumo.config.format`)


def append(path: Path, row: Row) -> None:
    """Add one line, and hand it to the operating system before returning."""
    with path.open("a") as log:
        log.write(line(row))


def read_log(path: Path) -> list[Row]:
    """All rows, in order, under the names of today; none where there is no file. A torn last line is left out.

    Raises UserError where any other line is no row with its step.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    rows: list[Row] = []
    for i, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            if not isinstance(row["step"], int):
                raise TypeError("its step is no number")
            rows.append(renamed(row))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if i < len(lines):
                raise UserError(f"{path}, line {i} is no row of a log ({error}): mend or remove that line") from error
    return rows


def renamed(row: Row) -> Row:
    """A row whose notes have the names of today, whichever they were written under: beyond_u is clipped_share_u."""

    def today(name: str) -> str:
        first, line, part = name.partition("_")
        return RENAMED[first] + line + part if first in RENAMED else name

    tables = {key: row[key] for key in ("notes", "bins") if isinstance(row.get(key), dict)}
    return row | {key: {today(name): value for name, value in table.items()} for key, table in tables.items()}


def rewind(path: Path, step: int) -> None:
    """Drop what was logged after `step`, and a torn last line, atomically: a resumed run logs those steps again."""
    if not path.exists():
        return
    kept = [row for row in read_log(path) if row["step"] <= step]
    file.write(path, "".join(map(line, kept)).encode(), writer="", durable=True)


def line(row: Row) -> str:
    """The row as a line of strict JSON."""
    return json.dumps(finite(row), allow_nan=False) + "\n"
