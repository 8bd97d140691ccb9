"""Trained runs that come with dumo: something to sample and judge before anything is trained.

Each is an exported run in half precision (`dumo.export.own`), in `dumo/trained`, and is only read. `find` says which
folder a name means, `output_folder` where commands write their output. `tools/ship.py` makes such a folder.
"""

from pathlib import Path

from dumo.config.source import RUN_FILE, trained_name_of
from dumo.io import trained
from dumo.io.read import user_path


def find(source: str | Path) -> Path:
    """The folder of the run that comes with dumo by this name; another source as the path that it is.

    In a text, ~ and $NAMES of environment variables are expanded; a Path is taken as it is. Raises UserError where
    ./NAME holds a run, too, or a variable is not set.
    """
    name = trained_name_of(source)
    return _path(source) if name is None else trained.folder(name)


def output_folder(source: str | Path) -> Path:
    """The folder that commands write into: a run's own, and for a run that comes with dumo NAME, in the current one.

    Where ./NAME holds a run of the user's, it is dumo-NAME. Raises as `find`.
    """
    name = trained_name_of(source)
    if name is None:
        return _path(source)
    return Path(f"dumo-{name}" if (Path(name) / RUN_FILE).is_file() else name)


def _path(source: str | Path) -> Path:
    """The path of a source that is no name. Raises UserError for a variable that is not set."""
    return source if isinstance(source, Path) else user_path(source, "the run's folder")
