"""The standard deviation of a run's data: measured once, when it begins to train, and noted in its folder."""

from pathlib import Path

from dumo.data.source import Source
from dumo.io.json import read_json, write_json
from dumo.types import UserError

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
    file, way_out = folder / FILE, "delete it, and it is measured again"
    try:
        sd = read_json(file, way_out)["sd"]
        if sd is not None and (type(sd) not in (int, float) or not sd >= 0):
            raise TypeError("sd is no number from 0 on")
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): {way_out}") from error
    return sd
