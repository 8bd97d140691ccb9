"""What made the results of a cell: the commit of dumo, and the fingerprint of the objective that trained it.

`origin_of` notes this in a file next to the run as its training begins, and reads it where the run is there already. So
results name the commits of their trainings, and a run that another objective trained is refused.
"""

import shutil
import subprocess
from math import isclose
from pathlib import Path

from dumo.config.load import parse
from dumo.config.source import RUN_FILE
from dumo.io.read import read_json, write_json
from dumo.lab.fingerprint import fingerprint
from dumo.lab.plan import Cell
from dumo.types import Spec, UserError

_MAX_DIFFERENCE = 1e-5  # of equal fingerprints on two machines, over the value: times are drawn in float32


class Origin(Spec):
    """What made the results of a cell."""

    commit: str | None  # of dumo; with "-dirty" where its code was changed. None: dumo was installed without git
    fingerprint: dict[str, float]  # of the objective


def origin_of(cell: Cell, folder: Path) -> Origin:
    """The origin of a cell's run in `folder`, which is noted where that run has not begun.

    Raises UserError where the run was trained by another objective than the cell's of today, and where it has no note.
    """
    file = folder.with_name(f"{folder.name}.json")
    way_out = f"move {folder} away, and the cell is trained anew"
    if not (folder / RUN_FILE).is_file():
        today = Origin(commit=commit(), fingerprint=fingerprint(cell.spec))
        write_json(file, today.model_dump())
        return today
    noted = parse(Origin, read_json(file, way_out), str(file))
    if not equal_fingerprints(noted.fingerprint, fingerprint(cell.spec)):
        raise UserError(f"{folder} was trained by another version of its objective: {way_out}")
    return noted


def equal_fingerprints(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether two fingerprints are of one objective."""
    if a.keys() != b.keys():
        return False
    return all(isclose(a[name], b[name], rel_tol=_MAX_DIFFERENCE) for name in a)


def commit() -> str | None:
    """The commit of dumo that runs, as `Origin.commit`."""
    if shutil.which("git") is None:
        return None
    module = Path(__file__)
    git = ["git", "-C", str(module.parent)]
    is_tracked = subprocess.run([*git, "ls-files", "--error-unmatch", module.name], capture_output=True)
    if is_tracked.returncode:
        return None
    head = subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = [":(top)src/dumo/*.py", ":(top)src/dumo/*.yaml"]  # not results and pages, which measuring writes
    is_changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode != 0
    return f"{head}-dirty" if is_changed else head
