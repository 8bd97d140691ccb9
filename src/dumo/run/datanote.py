"""A run folder's data.json: the standard deviation and the fingerprint of its data, measured when training begins.

`update` measures and writes it; `read` reads it, to compare the data of a resumed run, and for the run's card.
"""

from dataclasses import dataclass
from pathlib import Path

from dumo.io.read import read_json, write_json
from dumo.io.source import DataSource
from dumo.types import UserError

FILE = "data.json"
ROWS = 256  # that are measured, the first of the first epoch in the order of seed 0: ours
_WAY_OUT = "delete it, and it is measured again"


@dataclass(frozen=True)
class DataNote:
    """What data.json says."""

    sd: float | None  # the standard deviation over all numbers of the first `rows`, EDM's sigma_data; None: unknown
    fingerprint: str | None = None  # of the source, if it has one
    rows: int = ROWS


def measure(source: DataSource) -> float:
    """The standard deviation over all numbers of the first ROWS rows, EDM's sigma_data."""
    x, _ = source.batch(0, ROWS, 0)
    return x.double().std().item()


def update(
    folder: Path, before: DataNote | None, source: DataSource, fingerprint: str | None = None, *, anew: bool = False
) -> DataNote:
    """The note of the data in `source`, written to data.json if it is new.

    `before` is the note that is there. It is measured again with `anew`, or where it has another fingerprint than
    `fingerprint`, that of the source (None: the source has none). Only one process may call this.
    """
    if before is None or before.sd is None or anew:
        note = DataNote(measure(source), fingerprint)
    elif fingerprint is None:
        note = before
    elif before.fingerprint in (None, fingerprint):
        note = DataNote(before.sd, fingerprint, before.rows)
    else:
        note = DataNote(measure(source), fingerprint)
    if note != before:
        _write(folder, note)
    return note


def _write(folder: Path, note: DataNote) -> None:
    """Write data.json."""
    content: dict[str, object] = {"sd": note.sd, "rows": note.rows}
    if note.fingerprint is not None:
        content["fingerprint"] = note.fingerprint
    write_json(folder / FILE, content)


def read(folder: Path) -> DataNote | None:
    """What data.json says; None: there is none. Raises UserError for a damaged file."""
    file = folder / FILE
    if not file.exists():
        return None
    content = read_json(file)
    try:
        sd = content["sd"]
        if sd is not None and (type(sd) not in (int, float) or not sd >= 0):
            raise TypeError("sd is no number from 0 on")
        return DataNote(sd, content.get("fingerprint"), content.get("rows", ROWS))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): {_WAY_OUT}") from error
