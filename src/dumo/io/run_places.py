"""Where runs lie; and trained runs that ship with dumo: their names, and the folder of each, which is only read.

`holds_own_images` says which folders are left out where images of the user's are sought. `names` and `folder` say what
there is of trained runs. `path_in` takes a place such as dumo:cifar10-trained/taef2.safetensors, a file of such a run
wherever dumo is installed. `dumo.run.read_only` opens them; `tools/ship.py` makes them.
"""

import os
from collections.abc import Collection
from pathlib import Path

RUN_FILE = "run.yaml"  # in a run's folder: the run's settings
RUNS_FOLDER = "runs"  # in the working folder: the runs, unless --out names another folder
LATENTS_FOLDER = f"{RUNS_FOLDER}/latents"  # the latents of images of the user's
FOLDER = Path(__file__).parents[1] / "trained"
SHIPPED_PREFIX = "dumo:"  # before a recipe's or trained run's name: the one that dumo ships, whatever lies here


def holds_own_images(folder: str, names: Collection[str]) -> bool:
    """Whether dumo itself put the images into a folder, in which these names are: samples of a run, or runs/latents.

    Who looks for images of the user's in a folder above leaves it out.
    """
    is_latents_folder = os.path.abspath(folder).endswith(f"{os.sep}{LATENTS_FOLDER}")
    return RUN_FILE in names or is_latents_folder


def names() -> list[str]:
    """Return the names of the runs that ship with dumo, sorted."""
    return sorted(run_folder.name for run_folder in FOLDER.iterdir() if run_folder.is_dir())


def folder(name: str) -> Path:
    """Return the folder of the run of this name."""
    return FOLDER / name


def path_in(text: str) -> Path | None:
    """Return the folder or file that dumo:NAME or dumo:NAME/FILE means; None where a text does not begin so."""
    if not text.startswith(SHIPPED_PREFIX):
        return None
    name, _, file = text.removeprefix(SHIPPED_PREFIX).partition("/")
    return folder(name) / file if name in names() else None
