"""What is found out about a user's files and kept for the next time: beside them, else in the user's cache folder.

It can always be made again, so nothing depends on it: where it cannot be written, it is done without.
"""

import os
from pathlib import Path

from dumo.io import digest


def places(folder: Path, name: str) -> list[Path]:
    """Where to look for a note on what is in a folder, and to write it, the best place first.

    Beside the files, hidden by its name. Else below $XDG_CACHE_HOME, or ~/.cache: in `dumo`, by the folder's path.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [folder / name, home / "dumo" / digest.short(str(folder.resolve())) / name.removeprefix(".")]


def writable(place: Path) -> bool:
    """Whether something may be written there; makes the folders above it."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place.parent, os.W_OK | os.X_OK)
