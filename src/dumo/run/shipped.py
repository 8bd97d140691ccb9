"""Trained runs that come with dumo: something to sample and judge before anything is trained.

Each is a run's folder in `dumo/trained`. Its checkpoint has nothing but the weights that are shown, in half precision.
`tools/ship.py` makes it.
"""

import shutil
from pathlib import Path

from dumo.config.source import shipped_name
from dumo.io.file import atomic_write
from dumo.training import manifest
from dumo.types import UserError

HERE = Path(__file__).parents[1] / "trained"


def names() -> list[str]:
    """The names of the runs that come with dumo, sorted."""
    return sorted(folder.name for folder in HERE.iterdir())


def find(source: str | Path) -> Path:
    """A run's folder as given, or of one that comes with dumo its copy, runs/NAME, made where there is none.

    A copy, because commands write into a run's folder. A Path is a folder as given, if it is there. Raises UserError
    where another run has its place, or lies here under that name, too; OSError where nothing can be written.
    """
    if isinstance(source, Path) and source.exists():
        return source
    name = shipped_name(str(source), names())
    if name is None:
        return Path(source)
    copy = Path("runs", name)
    if not copy.exists():
        with atomic_write(copy) as half:
            shutil.copytree(HERE / name, half)
    (listed,) = (HERE / name).glob(f"checkpoints/*/{manifest.NAME}")
    copied = copy / listed.relative_to(HERE / name)
    if not copied.is_file() or copied.read_bytes() != listed.read_bytes():
        raise UserError(f"{copy} is not the {name} that dumo brings: open it as {copy}, or move it away")
    return copy
