"""The paths of runs, and of the trained runs that ship with dumo, whose folders are read-only.

`holds_own_images` detects folders to skip in a search for the user's images. `names` and `folder` list the trained
runs. `path_in` returns the path of a file in a trained run, such as dumo:cifar10-trained/taef2.safetensors.
`dumo.run.read_only` opens trained runs; `tools/ship.py` creates them.
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
    """Whether a folder with these file names has images from dumo: samples of a run, or runs/latents.

    A search for the user's images skips such folders.
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
    """Return the path of dumo:NAME or dumo:NAME/FILE, or None for another text."""
    if not text.startswith(SHIPPED_PREFIX):
        return None
    name, _, file = text.removeprefix(SHIPPED_PREFIX).partition("/")
    return folder(name) / file if name in names() else None
