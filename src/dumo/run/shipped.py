"""Trained runs that come with dumo: something to sample and judge before anything is trained.

Each is a run's folder in `dumo/trained`. Its checkpoint has nothing but the weights that are shown, in half precision.
`tools/ship.py` makes it.
"""

import shutil
from pathlib import Path

from dumo.io.file import whole
from dumo.training import manifest
from dumo.types import UserError

HERE = Path(__file__).parents[1] / "trained"


def names() -> list[str]:
    """Of all of them."""
    return sorted(folder.name for folder in HERE.iterdir())


def find(source: str) -> Path:
    """A run's folder as given, or of one that comes with dumo its copy, runs/NAME, made where there is none.

    A copy, because commands write into a run's folder. Raises UserError where another run has its place, OSError where
    nothing can be written.
    """
    if source not in names() or Path(source).exists():
        return Path(source)
    if not (copy := Path("runs", source)).exists():
        with whole(copy) as half:
            shutil.copytree(HERE / source, half)
    (listed,) = (HERE / source).glob(f"checkpoints/*/{manifest.NAME}")
    own = copy / listed.relative_to(HERE / source)
    if not own.is_file() or own.read_bytes() != listed.read_bytes():
        raise UserError(f"{copy} is not the {source} that dumo brings: open it as {copy}, or move it away")
    return copy
