"""Trained runs that come with dumo: something to sample and judge before anything is trained.

Each is a run's folder in `dumo/trained`, which is only read: its checkpoint has nothing but the weights that are shown,
in half precision. `find` says which folder a name means, `output_folder` where commands write what is made of it, and
`fix` what to type for a source that is no run. `tools/ship.py` makes such a folder.
"""

from pathlib import Path

from dumo.config.source import FILE, RUNS, recipe_of, trained_name_of
from dumo.io import trained


def find(source: str | Path) -> Path:
    """The folder of the run that comes with dumo by this name; another source as the path that it is.

    A Path to the folder of a run is that folder. Raises UserError where ./NAME holds a run, too.
    """
    name = trained_name_of(source)
    return Path(source) if name is None else trained.folder(name)


def output_folder(source: str | Path) -> Path:
    """The folder that commands write into: a run's own, and for a run that comes with dumo NAME, in the current one.

    Raises as `find`.
    """
    name = trained_name_of(source)
    return Path(source) if name is None else Path(name)


def fix(source: str | Path) -> str:
    """What to type in place of a source that is no run's folder."""
    recipe = recipe_of(source)
    if recipe is None:
        return f"train one first, e.g. dumo train digits, or take {' or '.join(trained.names())}, which dumo brings"
    run_folder = Path(RUNS, recipe)
    if (run_folder / FILE).is_file():
        return f"the recipe of this name was trained in {run_folder}: give that folder"
    family, *_ = recipe.split("-")
    alike = [name for name in trained.names() if name.startswith(f"{family}-")] or trained.names()
    return f"dumo train {recipe} trains the recipe of this name; or take {' or '.join(alike)}, which dumo brings"
