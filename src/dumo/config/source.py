"""Read the settings of a recipe, a YAML file or a run's folder, merged over its bases (ADR 0002).

1. `choose` interprets an argument as a recipe, a file, a run, a bundled run, or images, which may be a data set on the
   Hugging Face Hub.
2. `read` returns the plain values of a source, merged over its bases. `dumo.config.load` converts them to a run.

A run.yaml is complete and has a format number (ADR 0003); files of users need none. If a run was moved together with
its latents or texts, `read_file` finds them next to it.
"""

import os
import re
import shlex
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dumo.config import recipe_files
from dumo.config.change import merge
from dumo.config.overrides import field_of
from dumo.config.place import RUN_FILE as RUN_FILE
from dumo.config.place import (
    RUNS_FOLDER,
    TEXTS_FOLDER,
    find_content,
    find_run_file,
    is_table,
    run_folders,
)
from dumo.error import UserError
from dumo.io import hub, run_places
from dumo.io.read import brief, read_text, user_path
from dumo.io.run_places import SHIPPED_PREFIX as SHIPPED_PREFIX
from dumo.io.yaml import parse_mapping, yaml_text

# The keys of a run.yaml besides the fields of a run.
FORMAT_KEY = "format"
FORMAT = 2
HASH_KEY = "hash"  # of the fields that decide training (`dumo.config.difference.config_hash`)
ORIGIN_KEY = "origin"  # the checkpoint of another run that it began from (`Origin`)
RESOLVED_KEY = "resolved"  # the fields that were found when the run was opened (`dumo.run.resolve`)
# The keys in `resolved` besides the fields.
CODE_KEY = "code"  # hashes of the code of classes from outside, by name
DATA_KEY = "data"  # the standard deviation and the fingerprint of the data (`dumo.run.data.DataFacts`)
# The key of a recipe that names its group (`dumo.config.recipe_files`).
GROUP_KEY = "group"

# Recipes for a folder of images, in pixels and in latents.
IMAGES_RECIPE = "my-images"
IMAGES_LATENTS_RECIPE = "my-images-64"

_BASE_VARIABLE = re.compile(r"\$\{(\w+):-([\w-]+)\}")  # ${NAME:-recipe}, as in a shell
_SOURCE_FIX = "give a run's folder, a recipe or a YAML file"
_LATENTS_FIELDS = ("kind", "root", "images", "codec", "memory", "prior")  # fields of data.kind=latents


class Origin(BaseModel):
    """The checkpoint of another run from which a run was started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str  # the absolute path of the other run's folder
    step: int


@dataclass(frozen=True)
class RunText:
    """The settings of a source, merged over its bases."""

    tree: dict[str, Any]  # plain values
    name: str  # the name of the source, for errors
    hash: str | None = None  # the hash in a run.yaml. None means that no run was started
    origin: Origin | None = None


@dataclass(frozen=True)
class ChosenSource:
    """The interpretation of a source. A path that does not exist is a file, for which `read` raises an error."""

    kind: Literal["recipe", "file", "run", "trained", "images"]
    word: str | Path  # the argument for `read`, or the path of images
    folder: Path  # the folder to train in, unless another is given
    is_resumed: bool = True  # for a run: resume it, or use its settings for a new run

    @property
    def meaning(self) -> str:
        """A description of the interpretation."""
        match self.kind:
            case "recipe":
                return f"the recipe {self._shipped_name}"
            case "file":
                return f"the settings in {self.word}"
            case "run" if self.is_resumed:
                return f"the run in {self.folder}, which is resumed"
            case "run":
                return f"the settings of the run in {self.folder}, for a new run"
            case "trained":
                return (
                    f"the weights and settings of the trained run {self._shipped_name}, for a new run in {self.folder}"
                )
            case "images":
                return f"the images in {self.word}"

    @property
    def settings(self) -> list[str]:
        """Overrides that the source implies, to apply before the user's."""
        if self.kind != "trained":
            return []
        return [f"start={yaml_text({'source': f'{SHIPPED_PREFIX}{self._shipped_name}'})}"]

    @property
    def _shipped_name(self) -> str:
        """The name of a bundled recipe or run, without the prefix."""
        return str(self.word).removeprefix(SHIPPED_PREFIX)


def choose(source: str | Path, out: Path | None = None) -> ChosenSource:
    """Interpret a source as a recipe, a YAML file, a run's folder (or run.yaml), a bundled trained run, or images.

    `out` is the folder to train in, if given. If it has the name of a recipe and contains a run, the name means the
    run, so that `train digits --out digits` resumes if it is repeated. Raises UserError if NAME is a recipe and ./NAME
    contains a run or images, and for the folder of a diffusers pipeline.
    """
    if out is not None and source in recipe_files.names() and out == Path(source) and (out / RUN_FILE).is_file():
        return ChosenSource("run", f"./{source}", out)
    recipe = _recipe_of(source)
    if recipe is not None:
        return ChosenSource("recipe", source, Path(RUNS_FOLDER) / recipe)
    trained_name = trained_name_of(source)
    if trained_name is not None:
        return ChosenSource("trained", source, Path(RUNS_FOLDER) / trained_name)
    if isinstance(source, str) and hub.is_hub_name(source):
        return ChosenSource("images", source, folder_of_images(source))
    path = user_path(str(source), "the source")
    if path.name == RUN_FILE and path.is_file():
        return ChosenSource("run", source, path.parent, is_resumed=out is None or out == path.parent)
    if (path / RUN_FILE).is_file():
        return ChosenSource("run", source, path, is_resumed=out is None or out == path)
    if path.is_dir() or (path.is_file() and is_table(path)):
        # The folder of a pipeline may contain sample images, which are not meant for training.
        if (path / hub.INDEX).is_file():
            option = shlex.quote(f"pipeline={yaml_text(str(source))}")
            raise UserError(
                f"{source} is a pipeline folder, not a run or images: pass it to a recipe, dumo train sd3-lora {option}"
            )
        return ChosenSource("images", source, folder_of_images(source))
    return ChosenSource("file", source, Path(RUNS_FOLDER) / path.stem)


def folder_of_images(place: str | Path) -> Path:
    """Return the folder runs/NAME to train in, by the name of the folder or file of images."""
    if hub.is_hub_name(str(place)):
        return Path(RUNS_FOLDER) / Path(hub.repository_of(str(place))).name
    path = user_path(str(place), "the images").resolve()
    # A dot in the name of a folder does not begin a suffix.
    name = path.stem if path.is_file() else path.name
    return Path(RUNS_FOLDER) / name


def settings_of_images(tree: dict[str, Any], texts: Sequence[str], place: str | None = None) -> list[str]:
    """Return settings of image data, each a.b=c, for the run of a tree: for latents, data.side is data.images.side.

    If `place` is given, also set the path of the images.
    """
    data = tree.get("data")
    is_of_latents = isinstance(data, dict) and data.get("kind") == "latents"
    images_field = "data.images" if is_of_latents else "data"
    changes = [] if place is None else [f"{images_field}.root={yaml_text(place)}"]
    for text in texts:
        if _is_of_images(text):
            changes.append(f"{images_field}.{text.removeprefix('data.')}")
        else:
            changes.append(text)
    return changes


def _is_of_images(setting: str) -> bool:
    """Whether a setting, a.b=c, is of a field that `data.images` has in a run of latents."""
    names = field_of(setting).split(".")
    return names[0] == "data" and len(names) > 1 and names[1] not in _LATENTS_FIELDS


def _recipe_of(source: str | Path) -> str | None:
    """Return the recipe name that a source refers to, or None for a path. An existing `Path` is always a path.

    Raises UserError if ./NAME holds a run or images.
    """
    if isinstance(source, Path) and source.exists():
        return None
    return _find_shipped_name(str(source), recipe_files.names(), images=True)


def trained_name_of(source: str | Path) -> str | None:
    """Return the bundled trained run that a source refers to, or None if it is a path.

    Raises UserError if ./NAME holds a run.
    """
    if isinstance(source, Path) and (source / RUN_FILE).is_file():
        return None
    return _find_shipped_name(str(source), run_places.names())


def _find_shipped_name(source: str, names: Collection[str], *, images: bool = False) -> str | None:
    """Return the name among `names` that a source refers to, or None if it is a path.

    Raises UserError if ./NAME holds a run, or with `images` also images: then the source may mean either.
    """
    name = source.removeprefix(SHIPPED_PREFIX)
    if name not in names:
        return None
    if name == source and find_content(Path(source), images=images) is not None:
        raise UserError(
            f"{source} is a name in dumo and also a folder: write {SHIPPED_PREFIX}{source} for the name, or ./{source} "
            "for the folder"
        )
    return name


def read(source: str | Path) -> RunText:
    """Read what a source says, merged over its bases. Raises UserError if there is none, or it cannot be read.

    In a text, ~ and $NAMES of environment variables are expanded; a `Path` is taken as it is.
    """
    recipe = _recipe_of(source)
    if recipe is not None:
        name = f"recipe {recipe}"
        return RunText(_merge_over_base(_recipe_tree(recipe), name, None), name)
    trained_name = trained_name_of(source)
    if trained_name is not None:
        return read_file(run_places.folder(trained_name) / RUN_FILE)
    path = source if isinstance(source, Path) else hub.path_of(source, "the source", choose_run_files)
    file = find_run_file(path)
    if file is not None:
        return read_file(file)
    if path.is_dir():
        raise UserError(f"{source} is a folder without a {RUN_FILE}: {_SOURCE_FIX}")
    raise UserError(f"there is no recipe, file or run's folder '{brief(source)}'; {_hint(str(source))}")


def choose_run_files(files: Collection[str]) -> list[str]:
    """Choose what is read of a run in a repository on the Hub, as `dumo export` writes it; nothing if it holds none."""
    if RUN_FILE not in files:
        return []
    return [RUN_FILE, *(file for file in files if "/" not in file and file.endswith((hub.SUFFIX, ".json")))]


def read_file(file: Path) -> RunText:
    """Read a YAML file, merged over its bases. For a run.yaml, use latents and texts next to it. Raises UserError."""
    text = parse_text(_file_text(file), file)
    if file.name == RUN_FILE:
        folder = file.absolute().parent
        _follow_moved_folder(text.tree, ["data"], Path(run_places.LATENTS_FOLDER).name, folder)
        _follow_moved_cache(text.tree, TEXTS_FOLDER, folder)
    return text


def _follow_moved_folder(tree: dict[str, Any], keys: Sequence[str], name: str, folder: Path) -> None:
    """Set `root` in the part of a tree at `keys` if it was a folder NAME/X next to the run, and was moved with it.

    `folder` is where the run is now.
    """
    part: Any = tree
    for key in keys:
        part = part.get(key) if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(part.get("root"), str):
        return
    noted = Path(part["root"])
    next_to_run = folder.parent / name / noted.name
    was_next_to_runs = noted.is_absolute() and noted.parent.name == name
    if was_next_to_runs and not noted.is_dir() and next_to_run.is_dir():
        part["root"] = str(next_to_run)


def _follow_moved_cache(tree: dict[str, Any], name: str, folder: Path) -> None:
    """Set net.texts.root in a tree if it was the folder NAME next to the run, and was moved with it.

    `folder` is where the run is now.
    """
    net = tree.get("net")
    texts = net.get("texts") if isinstance(net, dict) else None
    if not isinstance(texts, dict) or not isinstance(texts.get("root"), str):
        return
    noted = Path(texts["root"])
    next_to_run = folder.parent / name
    if noted.is_absolute() and noted.name == name and not noted.is_dir() and next_to_run.is_dir():
        texts["root"] = str(next_to_run)


def without_resolved(text: RunText) -> RunText:
    """Return the text of a run without resolved values, for a new run with its settings."""
    tree = dict(text.tree)
    tree.pop(RESOLVED_KEY, None)
    return replace(text, tree=tree, hash=None, origin=None)


def parse_text(text: str, file: Path) -> RunText:
    """Parse the text of a YAML file, merged over its bases. Raises UserError."""
    tree = _parse_mapping(text, str(file))
    origin = tree.pop(ORIGIN_KEY, None)
    recorded_hash = tree.pop(HASH_KEY, None)
    _take_format(tree, file)
    return RunText(
        _merge_over_base(tree, str(file), file),
        str(file),
        None if recorded_hash is None else str(recorded_hash),
        None if origin is None else Origin.model_validate(origin),
    )


def _file_text(file: Path) -> str:
    """Return the text of a YAML file. Raises OSError, and UserError if it is not UTF-8."""
    return read_text(file)


def _merge_over_base(
    tree: dict[str, Any], name: str, file: Path | None, derived: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Merge a tree over its base, recursively; `derived` are the files and recipes that have this tree as a base."""
    if "base" not in tree:
        return tree
    place = str(file.resolve()) if file else name
    if place in derived:
        raise UserError(f"{name}: base is circular: {' -> '.join((*derived, place))}")
    base_tree, base_name, base_file = _read_base(tree.pop("base"), name, file)
    merged_base = _merge_over_base(base_tree, base_name, base_file, (*derived, place))
    try:
        return merge(merged_base, tree)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _read_base(base: object, name: str, file: Path | None) -> tuple[dict[str, Any], str, Path | None]:
    """Return the tree, name and file of a base: a recipe, or a path relative to the file that names it.

    As in a shell, ${NAME:-recipe} is the path in this variable, relative to the working folder, or the recipe if it is
    unset.
    """
    word = base if isinstance(base, str) else yaml_text(base)
    # Relative paths begin in this folder. The base of a recipe cannot be a path.
    folder = file.parent if file else None
    variable = _BASE_VARIABLE.fullmatch(word)
    if variable:
        word = os.environ.get(variable[1]) or variable[2]
        base = word
        folder = Path()
        name = f"{name}: ${variable[1]}"
    if isinstance(base, str):
        recipe = base.removeprefix(SHIPPED_PREFIX)
        # A recipe takes precedence over a file of the same name.
        if recipe in recipe_files.names():
            return _recipe_tree(recipe), f"recipe {recipe}", None
        base_file = find_run_file(folder / user_path(base, "base")) if folder is not None else None
        if base_file:
            tree = _parse_mapping(_file_text(base_file), str(base_file))
            _take_format(tree, base_file)
            # Remove entries of a run.yaml that are not settings.
            for key in (HASH_KEY, ORIGIN_KEY, RESOLVED_KEY):
                tree.pop(key, None)
            return tree, str(base_file), base_file
    raise UserError(
        f"{name}: base: there is no recipe '{brief(word)}', nor a file or run's folder there; {_hint(word)}"
    )


def _take_format(tree: dict[str, Any], file: Path) -> None:
    """Remove the format from the tree of a file. Raises UserError for another format."""
    file_format = tree.pop(FORMAT_KEY, FORMAT)
    if file_format != FORMAT:
        raise UserError(
            f"{file} has format {brief(yaml_text(file_format))}, but this version of dumo supports only {FORMAT}"
        )


def _recipe_tree(name: str) -> dict[str, Any]:
    """Return a copy of the plain values of a recipe, without its group, which is not a field of a run."""
    tree = deepcopy(recipe_files.tree(name))
    del tree[GROUP_KEY]
    return tree


def _parse_mapping(text: str, name: str) -> dict[str, Any]:
    """Return the mapping in a YAML text. Raises UserError, beginning with its source's `name`, for other values."""
    tree = parse_mapping(text, name, "run", "as `dumo show digits` prints it")
    # The group of a recipe is not a field of a run.
    tree.pop(GROUP_KEY, None)
    return tree


def _hint(name: str) -> str:
    """Return a hint for a missing source: the nearest name, and how to list recipes."""
    here = [str(path) for path in Path(name).parent.glob("*") if path.is_dir() or path.suffix in (".yaml", ".yml")]
    near_names = get_close_matches(name, [*recipe_files.names(), *here, *run_folders()], n=1)
    hint = f"did you mean '{near_names[0]}'? " if near_names else ""
    return f"{hint}`dumo recipes` lists all"
