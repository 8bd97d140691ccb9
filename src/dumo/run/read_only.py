"""Read-only runs: runs that ship with dumo, and runs on the Hugging Face Hub, OWNER/NAME.

Each is an exported run (`dumo.export.dumo_run`). Bundled runs are in half precision in `dumo/trained`, created by
`tools/ship.py`. `find` returns the folder of a run, and `output_folder` the folder to which commands write.
"""

from pathlib import Path

from dumo.config.source import RUN_FILE, choose_run_files, trained_name_of
from dumo.io import hub, run_places
from dumo.io.read import user_path
from dumo.io.run_places import SHIPPED_PREFIX


def find(source: str | Path) -> Path:
    """Return the folder of a run, given its name or path. A run on the Hub is downloaded.

    In a str, ~ and environment variables are expanded; a Path is used unchanged. Raise UserError if a bundled run's
    name is also a run folder ./NAME, or if a variable is not set.
    """
    if isinstance(source, str) and hub.is_hub_name(source):
        return hub.fetch(source, choose_run_files)
    name = trained_name_of(source)
    return _path(source) if name is None else run_places.folder(name)


def lasting_name(source: str | Path) -> str | None:
    """Return the permanent name of a read-only run, dumo:NAME or OWNER/NAME@COMMIT; None for a folder."""
    if isinstance(source, str) and hub.is_hub_name(source):
        return hub.pin(source)
    name = trained_name_of(source)
    return None if name is None else f"{SHIPPED_PREFIX}{name}"


def output_folder(source: str | Path) -> Path:
    """Return the folder to which commands write: the run's folder, or ./NAME for a read-only run.

    If ./NAME is a run folder of the user, return ./dumo-NAME.
    """
    if isinstance(source, str) and hub.is_hub_name(source):
        name = Path(hub.repository_of(source)).name
    else:
        name = trained_name_of(source)
    if name is None:
        return _path(source)
    return Path(f"dumo-{name}" if (Path(name) / RUN_FILE).is_file() else name)


def _path(source: str | Path) -> Path:
    """Return the path of a source. Raise UserError if an environment variable is not set."""
    return source if isinstance(source, Path) else user_path(source, "the run's folder")
