"""Runs that are only read: those that come with dumo, and runs on the Hugging Face Hub, OWNER/NAME.

Each is an exported run (`dumo.export.dumo_run`). Those that come with dumo are in half precision, in `dumo/trained`,
which `tools/ship.py` makes. `find` says which folder a name means, `output_folder` where commands write their output.
"""

from pathlib import Path

from dumo.config.source import RUN_FILE, choose_run_files, trained_name_of
from dumo.io import hub, run_places
from dumo.io.read import user_path
from dumo.io.run_places import SHIPPED_PREFIX


def find(source: str | Path) -> Path:
    """The folder of the run of this name; another source as the path that it is. A run on the Hub is fetched.

    In a text, ~ and $NAMES of environment variables are expanded; a Path is taken as it is. Raises UserError if ./NAME
    holds a run, too, or a variable is not set; and the Hub's errors.
    """
    if isinstance(source, str) and hub.is_hub_name(source):
        return hub.fetch(source, choose_run_files)
    name = trained_name_of(source)
    return _path(source) if name is None else run_places.folder(name)


def lasting_name(source: str | Path) -> str | None:
    """What opens a run that is only read again, dumo:NAME or OWNER/NAME@COMMIT; None for a folder."""
    if isinstance(source, str) and hub.is_hub_name(source):
        return hub.pin(source)
    name = trained_name_of(source)
    return None if name is None else f"{SHIPPED_PREFIX}{name}"


def output_folder(source: str | Path) -> Path:
    """The folder that commands write into: a run's own, and for a run that is only read NAME, in the current one.

    Where ./NAME holds a run of the user's, it is dumo-NAME. Raises as `find`.
    """
    if isinstance(source, str) and hub.is_hub_name(source):
        name = Path(hub.repository_of(source)).name
    else:
        name = trained_name_of(source)
    if name is None:
        return _path(source)
    return Path(f"dumo-{name}" if (Path(name) / RUN_FILE).is_file() else name)


def _path(source: str | Path) -> Path:
    """The path of a source that is no name. Raises UserError for a variable that is not set."""
    return source if isinstance(source, Path) else user_path(source, "the run's folder")
