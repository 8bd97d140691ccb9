"""What lies at a place on the disk: a run, images, an evaluation, a log; and what is said where it is something else.

Each `require_...` refuses a place by what is there instead, and by the nearest names. `find_content`, `is_image`,
`is_table` and `run_file` ask without refusing. Imports no torch, so that a wrong name is answered at once.
"""

import errno
import os
from pathlib import Path

from dumo.config import recipes
from dumo.error import UserError
from dumo.io import trained
from dumo.io.read import brief, user_path
from dumo.runtime import shell_path

FILE = "run.yaml"  # the run, in its folder
EVALUATION = "evaluation.json"  # in a run's folder: its evaluation as its own spec has it judged
LOG = "metrics.jsonl"  # in a run's folder: a row for each step that is logged
RUNS = "runs"  # where runs are, unless another folder is given
MANY = 2000  # names in a folder, of which no more are compared with a name that is not there: ours


def require_run_folder(source: str | Path, folder: Path) -> None:
    """Raise UserError where a folder holds no run, with what it is instead; `source` is as the user wrote it."""
    if run_file(folder / FILE) is not None:
        return
    reason, fix = _explain_no_run(str(source), folder)
    family, *_ = str(source).split("-")
    near_trained = [name for name in trained.names() if name.startswith(f"{family}-")] or trained.names()
    raise UserError(
        f"{source} is no run's folder ({reason}): {fix}, or take {' or '.join(near_trained)}, which dumo brings"
    )


def _explain_no_run(source: str, folder: Path) -> tuple[str, str]:
    """What a folder is that holds no run, and how to get one that does."""
    train_first = "train one first, e.g. dumo train digits"
    if not os.path.lexists(folder):
        run = Path(RUNS) / source
        if source not in recipes.names():
            return "it is not there", _near_runs(source) + train_first
        if (run / FILE).is_file():
            return "it is a recipe", f"its run here is {run}"
        return "it is a recipe", f"train it first, dumo train {source}, then give {run}"
    if not folder.is_dir():
        return "it is a file", f"give the folder that holds a {FILE}"
    if find_content(folder, images=True) == "images":
        place = shell_path(source)
        fix = f"train on them first, dumo train {place}, judge them, dumo evaluate --images {place}"
        return f"it holds images, and no {FILE}", fix
    return f"it has no {FILE}", train_first


def require_images(place: str | Path) -> None:
    """Raise UserError where a folder that is taken for one of images has no file that may hold some."""
    folder = user_path(str(place), "the source")
    if folder.is_dir() and find_content(folder, images=True) is None:
        raise UserError(
            f"{place} has neither a {FILE} nor images, at any depth: give a folder with image files (.jpg, .png, .webp "
            f"...), *.parquet or *.tar, a run's folder, a recipe or a YAML file"
        )


def find_content(folder: Path, *, images: bool) -> str | None:
    """What a folder holds that may be a source: a run, or images if these count; None: neither."""
    if (folder / FILE).is_file():
        return "a run"
    if not images or not folder.is_dir():
        return None
    from dumo.io.suffix import IMAGE_SUFFIXES, TABLE_SUFFIXES

    visited: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real_place = os.path.realpath(place)
        if real_place in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real_place)
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in IMAGE_SUFFIXES or ending in TABLE_SUFFIXES:
                return "images"
    return None


def is_image(path: Path) -> bool:
    """Whether a file is an image, by the end of its name."""
    from dumo.io.suffix import IMAGE_SUFFIXES

    return path.suffix.lower() in IMAGE_SUFFIXES


def is_table(path: Path) -> bool:
    """Whether a file is one that holds images, such as a .parquet, by the end of its name."""
    from dumo.io.suffix import TABLE_SUFFIXES

    return path.suffix in TABLE_SUFFIXES


def run_file(path: Path) -> Path | None:
    """The file that a path names, or the run.yaml of a folder; None where there is none, or can be none."""
    try:
        file = path / FILE if path.is_dir() else path
        return file if file.is_file() else None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return None


def names_here(folder: Path, file: str = "") -> list[str]:
    """The folders in a folder, and YAML files there, as they would be typed; with `file`, the folders that hold it."""
    try:
        names = [name for name, _ in zip(os.listdir(folder), range(MANY), strict=False)]
    except OSError:  # it is not there
        return []
    paths = [folder / name for name in names if not name.startswith(".")]
    if file:
        return [str(path) for path in paths if (path / file).is_file()]
    return [str(path) for path in paths if path.is_dir() or path.suffix in (".yaml", ".yml")]


def require_evaluation(source: str | Path) -> None:
    """Raise UserError where a path is neither the file of an evaluation nor the folder of a run that has one."""
    path = Path(source)
    if not path.exists():
        near_runs = _near_runs(str(source))
        raise UserError(
            f"there is no run's folder or evaluation {brief(str(source))}: {near_runs}give folders such as runs/digits"
        )
    if path.is_dir() and not any(path.glob("evaluation*.json")):
        raise UserError(f"{source} has no {EVALUATION}: run dumo evaluate {shell_path(source)} first")


def require_log(folder: Path) -> None:
    """Raise UserError where a folder has no log of a training."""
    if not (folder / LOG).is_file():
        raise UserError(
            f"{folder} has no {LOG}: {_near_runs(str(folder))}give a run's folder, such as runs/digits, once it has "
            "trained a while"
        )


def _near_runs(name: str) -> str:
    """A hint of the runs here whose folders have names near to one that is none; "": none has."""
    from dumo.config.suggestion import did_you_mean, nearest_names

    path_by_name: dict[str, str] = {}
    for folder in (Path(RUNS), Path(name).parent):
        for path in names_here(folder, FILE):
            path_by_name[Path(path).name] = path
    near_names = nearest_names(Path(name).name, path_by_name)
    return did_you_mean([path_by_name[near_name] for near_name in near_names])
