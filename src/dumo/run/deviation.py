"""A folder's data.json: the standard deviation and the fingerprint of the data, measured when training begins."""

from pathlib import Path
from typing import Any

from dumo.io.read import read_json, write_json
from dumo.io.source import Source
from dumo.types import UserError

FILE = "data.json"
ROWS = 256  # of the first epoch in the order of seed 0; ours


def measure(source: Source) -> float:
    """The standard deviation over all numbers of the first rows, as EDM's sigma_data."""
    x, _ = source.batch(0, ROWS, 0)
    return x.double().std().item()


def note(folder: Path, source: Source, fingerprint: str | None = None, *, anew: bool = False) -> float:
    """The deviation in the folder; measured and written if there is none, `anew`, or for data of another fingerprint.

    `fingerprint` is the source's, if it has one. Only one process may call it.
    """
    there = _read(folder)
    if (
        there is None
        or anew
        or there["sd"] is None
        or (fingerprint is not None and there.get("fingerprint", fingerprint) != fingerprint)
    ):
        there = {"sd": measure(source), "rows": ROWS}
    if (new := there | ({"fingerprint": fingerprint} if fingerprint else {})) != _read(folder):
        write_json(folder / FILE, new)
    return float(new["sd"])


def noted(folder: Path) -> float | None:
    """The deviation in the folder, if there is one. Raises UserError for a damaged file."""
    return None if (there := _read(folder)) is None else there["sd"]


def fingerprint(folder: Path) -> str | None:
    """The fingerprint of the data that the folder's run was trained on, if known. Raises as `noted`."""
    return (_read(folder) or {}).get("fingerprint")


def _read(folder: Path) -> dict[str, Any] | None:
    file, way_out = folder / FILE, "delete it, and it is measured again"
    if not file.exists():
        return None
    there = read_json(file, way_out)
    try:
        if there["sd"] is not None and (type(there["sd"]) not in (int, float) or not there["sd"] >= 0):
            raise TypeError("sd is no number from 0 on")
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): {way_out}") from error
    return there
