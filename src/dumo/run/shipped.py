"""Trained runs that come with dumo: something to sample and judge before anything is trained.

Each is a run's folder in `dumo/trained`, which is only read: its checkpoint has nothing but the weights that are shown,
in half precision. `find` says which folder a name means, `output_folder` where commands write what is made of it.
`tools/ship.py` makes such a folder.
"""

from pathlib import Path

from dumo.config.source import trained_name_of
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
