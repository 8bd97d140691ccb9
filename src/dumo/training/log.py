"""The log of a run: one JSON object a line, so that a torn write costs at most the last line.

JSON has no NaN and no infinity: they are written as null, such as the mean loss of a time bin that no row fell into.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
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


def flush(path: Path) -> None:
    """Wait until what was logged, if anything was, is on the disk."""
    if path.exists():
        file.flush(path)
        file.flush(path.parent)


def read_log(path: Path) -> list[Row]:
    """All rows, in order, under the names of today; none where there is no file. A torn last line is left out.

    Raises UserError where any other line is no row with its step.
    """
    if path.exists() and not path.is_file():  # a pipe, which nobody may ever write to
        raise UserError(f"{path} is no file: remove it")
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows: list[Row] = []
    for i, text in enumerate(lines, 1):
        try:
            row = json.loads(text.decode("utf-8"))
            if not isinstance(row["step"], int):
                raise TypeError("its step is no number")
            rows.append(renamed(row))
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # no text, no JSON, or no row
            if i < len(lines):
                raise UserError(f"{path}, line {i} is no row of a log ({error}): mend or remove that line") from error
    return rows


def gaps(rows: Sequence[Row], every: int) -> list[tuple[int, int]]:
    """Between which steps rows are lost, if one is logged every so many steps.

    How often may have been another number before: so only a distance that is larger than those on both sides is one.
    """
    steps = [row["step"] for row in rows if row["step"] % every == 0]
    away = [b - a for a, b in pairwise(steps)]
    around = zip([0, *away], away, [*away[1:], 0], strict=False)
    lost = [own > max(every, before, after) and bool(before or after) for before, own, after in around]
    return [(a, b) for (a, b), is_lost in zip(pairwise(steps), lost, strict=True) if is_lost]


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
