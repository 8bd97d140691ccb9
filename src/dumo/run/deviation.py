"""The standard deviation of a run's data: measured once, when it begins to train, and noted in its folder."""

from pathlib import Path

from dumo.data.source import Source
from dumo.io.json import read_json, write_json

FILE = "data.json"
ROWS = 256  # of the first epoch in the order of seed 0; ours


def measure(source: Source) -> float:
    """Over all numbers of the first rows together, as EDM's sigma_data: channels and places alike."""
    x, _ = source.batch(0, ROWS, 0)
    return x.double().std().item()


def note(folder: Path, source: Source) -> float:
    """The deviation that stands in the folder; measured and written where none does. One process alone may do it."""
    if (known := noted(folder)) is None:
        known = measure(source)
        write_json(folder / FILE, {"sd": known, "rows": ROWS})
    return known


def noted(folder: Path) -> float | None:
    """The deviation that stands in the folder; None where none does. Raises UserError for a damaged file."""
    try:
        return float(read_json(folder / FILE, "delete it, and it is measured again")["sd"])
    except FileNotFoundError:
        return None
