"""What lies at a path that a user named: a run's folder, images, an evaluation or a log.

- `require_run_folder`, `require_evaluation` and `require_log` raise UserError where something else lies there.
- `find_content`, `find_run_file`, `is_image` and `is_table` answer without raising.
- `list_sources` and `list_run_folders` list what a mistyped name is compared with.
"""

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from dumo.config import recipes
from dumo.error import UserError
from dumo.io import trained
from dumo.io.read import brief
from dumo.io.trained import RUN_FILE as RUN_FILE
from dumo.io.trained import RUNS_FOLDER as RUNS_FOLDER
from dumo.runtime import shell_path

EVALUATION_FILE = "evaluation.json"  # in a run's folder: its evaluation by the settings of run.yaml
TEXTS_FOLDER = "texts"  # next to runs: the tables of captions of images, by name
OTHER_EVALUATIONS = "evaluation-*.json"  # in a run's folder: its evaluations by other settings
LOG_FILE = "metrics.jsonl"  # in a run's folder: a row for each logged step
_MAX_LISTED_NAMES = 2000  # of a folder's names, those compared with a mistyped one: ours, so that the error comes soon
Content = Literal["run", "images"]


def require_run_folder(source: str | Path, folder: Path) -> None:
    """Raise UserError where `folder` holds no run. `source` is what the user typed for it."""
    run_file = folder / RUN_FILE
    if not _is_impossible(run_file) and run_file.is_file():
        return
    reason, fix = _explain_no_run(str(source), folder)
    family, *_ = str(source).split("-")
    trained_names = trained.names()
    same_family = [name for name in trained_names if name.startswith(f"{family}-")]
    if same_family:
        trained_names = same_family
    raise UserError(
        f"{source} is no run's folder ({reason}): {fix}, or take {' or '.join(trained_names)}, which dumo brings"
    )


def _explain_no_run(source: str, folder: Path) -> tuple[str, str]:
    """Why `folder`, typed as `source`, is no run's folder, and what to do instead. Both are parts of a sentence."""
    train_first = "train one first, e.g. dumo train digits"
    if not os.path.lexists(folder):
        if source not in recipes.names():
            return "it is not there", _near_runs(source) + train_first
        recipe_run = Path(RUNS_FOLDER) / source
        if (recipe_run / RUN_FILE).is_file():
            return "it is a recipe", f"its run here is {recipe_run}"
        return "it is a recipe", f"train it first, dumo train {source}, then give {recipe_run}"
    if not folder.exists():
        return f"it is a link to {os.readlink(folder)}, which is not there", f"bring that back, or {train_first}"
    if not folder.is_dir():
        return "it is a file", f"give the folder that holds a {RUN_FILE}"
    if find_content(folder, images=True) == "images":
        typed_path = shell_path(source)
        fix = f"train on them first, dumo train {typed_path}, judge them, dumo evaluate --images {typed_path}"
        return f"it holds images, and no {RUN_FILE}", fix
    return f"it has no {RUN_FILE}", train_first


def find_content(folder: Path, *, images: bool) -> Content | None:
    """What a folder holds: "run" where it has a run.yaml, "images" where a file at any depth may hold images.

    Files are known by their suffix. Hidden ones are left out, and below `folder` what dumo itself put there, as where
    images are opened (`dumo.data.store.walk_files`). Links to folders are followed, each folder is visited once, and
    the search ends at the first image. `images=False` looks for a run alone, without a search. None: neither is there.
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
        if is_below_folder and trained.holds_own_images(parent, {*subfolders, *names}):
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(name)
            if not name.startswith(".") and (is_image(path) or is_table(path)):
                return "images"
    return None


def is_image(path: Path) -> bool:
    """Whether a path has the suffix of an image file, in upper or lower case."""
    from dumo.io.suffix import IMAGE_SUFFIXES

    return path.suffix.lower() in IMAGE_SUFFIXES


def is_table(path: Path) -> bool:
    """Whether a path has the suffix of a file that holds images, .parquet or .tar, in upper or lower case."""
    from dumo.io.suffix import TABLE_SUFFIXES

    return path.suffix.lower() in TABLE_SUFFIXES


def find_run_file(path: Path) -> Path | None:
    """`path` if it is a file, or its run.yaml if it is a folder; None if neither is there or the name is too long."""
    try:
        file = path / RUN_FILE if path.is_dir() else path
        return file if file.is_file() else None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return None


def _is_impossible(path: Path) -> bool:
    """Whether the system takes no such name: it is too long, for which `Path.is_file` raises, or has a null byte."""
    try:
        os.lstat(path)
    except ValueError:
        return True
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def list_sources(folder: Path) -> list[str]:
    """The paths, as they would be typed, of the folders and YAML files in a folder. Hidden ones are left out."""
    paths: list[str] = []
    for path in _listed_paths(folder):
        if path.suffix in (".yaml", ".yml") or os.path.isdir(path):  # Path.is_dir raises where it may not look
            paths.append(str(path))
    return paths


def list_run_folders(folder: Path) -> list[str]:
    """The paths, as they would be typed, of the run folders in a folder. Hidden ones are left out."""
    paths: list[str] = []
    for path in _listed_paths(folder):
        if os.path.isfile(path / RUN_FILE):  # Path.is_file raises where it may not look
            paths.append(str(path))
    return paths


def _listed_paths(folder: Path) -> Iterable[Path]:
    """The first _MAX_LISTED_NAMES paths in a folder, without hidden ones; none where the folder cannot be listed."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names[:_MAX_LISTED_NAMES]:
        if not name.startswith("."):
            yield folder / name


def require_evaluation(source: str | Path) -> None:
    """Raise UserError where `source` is neither a file nor the folder of a run that was evaluated.

    A folder passes with any of its evaluations, also where it lacks evaluation.json: `dumo compare` then lists them. A
    file passes whatever it holds: who reads it refuses it.
    """
    path = Path(source)
    if _is_impossible(path) or not path.exists():
        near_runs = _near_runs(str(source))
        raise UserError(
            f"there is no run's folder or evaluation {brief(str(source))}: {near_runs}give folders such as runs/digits"
        )
    if not path.is_dir() or (path / EVALUATION_FILE).exists():
        return
    if not any(path.glob(OTHER_EVALUATIONS)):
        raise UserError(f"{source} has no {EVALUATION_FILE}: run dumo evaluate {shell_path(source)} first")


def require_log(folder: Path) -> None:
    """Raise UserError where a folder has no log of a training."""
    log_file = folder / LOG_FILE
    if _is_impossible(log_file) or not log_file.is_file():
        raise UserError(
            f"{folder} has no {LOG_FILE}: {_near_runs(str(folder))}give a run's folder, such as runs/digits, once it "
            "has trained a while"
        )


def _near_runs(name: str) -> str:
    """A hint, to begin a message with, of the run folders whose names are close to the mistyped `name`; "": none is.

    Looks in runs/ and in the folder that `name` leads to.
    """
    from dumo.config.suggestion import did_you_mean, nearest_names

    path_by_name: dict[str, str] = {}
    for parent in (Path(RUNS_FOLDER), Path(name).parent):
        for path in list_run_folders(parent):
            path_by_name[Path(path).name] = path
    near_names = nearest_names(Path(name).name, path_by_name)
    return did_you_mean([path_by_name[near_name] for near_name in near_names])
