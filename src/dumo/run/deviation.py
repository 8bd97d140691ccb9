"""What a run's folder knows of its data, measured when it begins to train: their deviation and their fingerprint."""

from pathlib import Path
from typing import Any

from dumo.data.source import Source
from dumo.io.json import read_json, write_json

FILE = "data.json"
ROWS = 256  # of the first epoch in the order of seed 0; ours


def measure(source: Source) -> float:
    """Over all numbers of the first rows together, as EDM's sigma_data: channels and places alike."""
    x, _ = source.batch(0, ROWS, 0)
    return x.double().std().item()


def note(folder: Path, source: Source, fingerprint: str | None = None) -> float:
    """The deviation that stands in the folder; measured and written where none does, or for data of another print.

    `fingerprint` is the source's; None: it has none. One process alone may do it.
    """
    there = _read(folder)
    if there is None or (fingerprint is not None and there.get("fingerprint", fingerprint) != fingerprint):
        there = {"sd": measure(source), "rows": ROWS}
    if (new := there | ({"fingerprint": fingerprint} if fingerprint else {})) != _read(folder):
        write_json(folder / FILE, new)
    return float(new["sd"])


def noted(folder: Path) -> float | None:
    """The deviation that stands in the folder; None where none does. Raises UserError for a damaged file."""
    there = _read(folder)
    return None if there is None else float(there["sd"])


def fingerprint(folder: Path) -> str | None:
    """That of the data that the folder's run was trained on; None where it is not known. Raises as `noted`."""
    return (_read(folder) or {}).get("fingerprint")


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / FILE, "delete it, and it is measured again")
    except FileNotFoundError:
        return None
