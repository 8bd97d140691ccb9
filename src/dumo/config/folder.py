"""A run's folder, to begin with: run.yaml, by which every other command knows what it holds."""

from pathlib import Path

from dumo.config.load import FILE, difference, dump, load
from dumo.config.spec import Run
from dumo.sample.archive import replacing
from dumo.types import UserError


def claim(run: Run, folder: Path) -> None:
    """See that the folder is free, or holds this run. Writes nothing. Raises UserError, with the difference if not."""
    if (folder / FILE).exists():
        if differs := list(difference(load(str(folder)), run)):
            lines = "\n  ".join([f"{folder} holds another run:", *differs])
            raise UserError(f"{lines}\nGive another folder with --out, or remove this one")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {FILE}: give another folder with --out")


def note(run: Run, folder: Path) -> None:
    """Write run.yaml, complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as out:
        out.write(dump(run).encode())
