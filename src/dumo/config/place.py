"""Detect the content of a path from the user: a run's folder, images or the evaluation of a run.

`require_run_folder` raises UserError if there is no run; the other functions answer without raising.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from dumo.config import recipe_files
from dumo.error import UserError
from dumo.io import run_places
from dumo.io.run_places import RUN_FILE as RUN_FILE
from dumo.io.run_places import RUNS_FOLDER as RUNS_FOLDER
from dumo.io.suffix import IMAGE_SUFFIXES, TABLE_SUFFIXES

# Files in a run's folder: its evaluation by the settings of run.yaml, those by other settings, and the log of training.
EVALUATION_FILE = "evaluation.json"
OTHER_EVALUATIONS = "evaluation-*.json"
LOG_FILE = "metrics.jsonl"
# Next to runs: the cache of encoded texts.
TEXTS_FOLDER = "texts"


def require_run_folder(source: str | Path, folder: Path) -> None:
    """Raise UserError if `folder` holds no run. `source` is what the user typed for it."""
    if (folder / RUN_FILE).is_file():
        return
    if str(source) in recipe_files.names():
        fix = f"train the recipe first, dumo train {source}, and give its folder"
    else:
        near_folders = get_close_matches(str(folder), run_folders(), n=1)
        hint = f"did you mean '{near_folders[0]}'? " if near_folders else ""
        fix = f"{hint}Train a run first, or use {' or '.join(run_places.names())}"
    raise UserError(f"{source} is not a run's folder, since it has no {RUN_FILE}: {fix}")


def find_content(folder: Path, *, images: bool) -> Literal["run", "images"] | None:
    """Return the content of a folder: "run" if it has a run.yaml, "images" if a file at any depth has images, or None.

    Files are known by their suffix. Hidden ones are left out, and below `folder` what dumo itself put there, as when
    images are opened (`dumo.data.rows.open_rows`). Links to folders are followed, each folder is visited once, and
    the search ends at the first image. `images=False` looks for a run alone, without a search.
    """
    if (folder / RUN_FILE).is_file():
        return "run"
    if not images or not folder.is_dir():
        return None
    visited: set[str] = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real_parent = os.path.realpath(parent)
        if real_parent in visited:  # a link led back to it
            subfolders.clear()
            continue
        is_below_folder = bool(visited)
        visited.add(real_parent)
        if is_below_folder and run_places.holds_own_images(parent, {*subfolders, *names}):
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(name)
            if not name.startswith(".") and (path.suffix.lower() in IMAGE_SUFFIXES or is_table(path)):
                return "images"
    return None


def is_table(path: Path) -> bool:
    """Whether a path has the suffix of an image table, .parquet or .tar, in upper or lower case."""
    return path.suffix.lower() in TABLE_SUFFIXES


def find_run_file(path: Path) -> Path | None:
    """Return `path` if it is a file, or its run.yaml if it is a folder, or None."""
    file = path / RUN_FILE if path.is_dir() else path
    return file if file.is_file() else None


def run_folders() -> list[str]:
    """Return the folders of runs in runs/, as they would be typed, for suggestions."""
    return [str(file.parent) for file in Path(RUNS_FOLDER).glob(f"*/{RUN_FILE}")]
