"""A run's folder, to begin with: run.yaml, by which every other command knows what it holds."""

from pathlib import Path

from dumo.config.load import FILE, difference, dump, load
from dumo.config.spec import Run
from dumo.sample.archive import replacing
from dumo.types import UserError


def settle(run: Run, folder: Path) -> None:
    """Write run.yaml, or, where it stands, see that this is the same run. Raises UserError with the difference."""
    file = folder / FILE
    if file.exists():
        differs = list(difference(load(str(folder)), run))
        if differs:
            raise UserError(
                f"{folder} holds another run:\n  "
                + "\n  ".join(differs)
                + "\nGive another folder with --out, or remove this one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {FILE}: give another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as out:
        out.write(dump(run).encode())
