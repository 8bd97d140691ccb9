"""Read a run's text: of a recipe, a YAML file or a run's folder, over the base that a file may name (ADR 0002).

1. `choose` decides what a word of the command line means: a recipe, a file, a run, a trained run that comes with dumo,
   or images; `trained_name_of` asks for a trained run alone. `folder_of_images` and `settings_of_images` are for
   images.
2. `read` gives the plain values that a source says, over its bases; `read_file` and `parse_text` do so for a file and
   its text. `dumo.config.load` makes a run of them. For a new run of an old run's settings, `without_resolved` leaves
   out what was found on the old one's files.

A run.yaml, which training writes complete, says its format (ADR 0003); files that people write need none. Of a run that
was moved with its latents or texts, `read_file` says where these are now.
"""

import os
import re
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dumo.config import recipes
from dumo.config.change import field_of, merge, yaml_text
from dumo.config.place import RUN_FILE as RUN_FILE
from dumo.config.place import (
    RUNS_FOLDER,
    TEXTS_FOLDER,
    find_content,
    find_run_file,
    is_image,
    is_table,
    list_run_folders,
    list_sources,
)
from dumo.error import UserError
from dumo.io import trained
from dumo.io.read import brief, read_text, user_path
from dumo.io.trained import SHIPPED_PREFIX as SHIPPED_PREFIX
from dumo.io.yaml import parse_mapping
from dumo.runtime.door import shell_settings

# keys of a run.yaml, besides the fields of a run
FORMAT_KEY = "format"  # the first one
FORMAT = 2  # the value that `dumo.config.load.dump` writes there
CHANGED_KEY = "changed"  # the fields that were changed while it trained (`RecordedChange`)
RESOLVED_KEY = "resolved"  # the fields that were found when the run was opened (`dumo.run.resolve`)
# keys in `resolved`, besides the fields
CODE_KEY = "code"  # hashes of the code of classes from outside, by name
TYPED_KEY = "given"  # paths as the user typed them, by the fields that have them absolute

_BASE_VARIABLE = re.compile(r"\$\{(\w+):-([\w-]+)\}")  # ${NAME:-recipe}, as a shell writes it
MAX_BYTES = 2**24  # of a file: ours; the names of 20,000 classes are half a million
_DEFAULT_TUNING_RECIPE = "sd3-lora"  # an example, of a pipeline that no recipe names
_SOURCE_FIX = "give a run's folder, a recipe or a YAML file"  # the fix that messages end with
IMAGES_RECIPE = "my-images"  # for images of the user's, in pixels
GROUP_KEY = "group"  # of a recipe (`dumo.config.recipes`)
IMAGES_LATENTS_RECIPE = "my-images-64"  # for images of the user's, in latents
_LATENTS_FIELDS = ("kind", "root", "images", "codec", "memory", "prior")  # fields of data.kind=latents
_ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")  # suffixes


class RecordedChange(BaseModel):
    """A change of a field while a run trained, as run.yaml lists it: the steps after `step` have the value `now`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    field: str  # its dotted path, or data: their fingerprint
    was: Any
    now: Any
    accepted: bool = False  # whether it took --accept, because the field is not one that may change

    @property
    def is_of_data(self) -> bool:
        """Whether the change is of the data's fingerprint, not of a field."""
        return self.field == "data" and not isinstance(self.was, dict)


@dataclass(frozen=True)
class RunText:
    """What a source says of a run, merged over its bases."""

    tree: dict[str, Any]  # plain values
    name: str  # of the source, for errors
    changed: tuple[RecordedChange, ...] = ()  # the changes while the run trained, in order


@dataclass(frozen=True)
class ChosenSource:
    """What the word that names a run was taken for. A path that does not exist is a file, which `read` refuses."""

    kind: Literal["recipe", "file", "run", "trained", "images"]
    word: str | Path  # what to give to `read`; for images their place
    folder: Path  # the folder to train in, unless another is given
    is_continued: bool = True  # of a run: whether it is trained in its own folder, not another one in a new folder

    @property
    def meaning(self) -> str:
        """What the word was taken for, in words."""
        match self.kind:
            case "recipe":
                return f"the recipe {self._shipped_name}, which dumo brings"
            case "file":
                return f"the settings in {self.word}"
            case "run":
                if self.is_continued:
                    return f"the run in {self.folder}, which goes on"
                return f"the settings of the run in {self.folder}, for a new run"
            case "trained":
                name = self._shipped_name
                return f"the run {name}, which dumo brings: a new run in {self.folder} begins with its weights"
            case "images":
                return f"the images in {self.word}"

    @property
    def settings(self) -> list[str]:
        """Fields to set in what the word says, as --set takes them, before those of the user."""
        if self.kind != "trained":
            return []
        return [f"start={yaml_text({'source': f'{SHIPPED_PREFIX}{self._shipped_name}'})}"]

    @property
    def _shipped_name(self) -> str:
        """The word, where it names a recipe or a trained run that dumo brings, without the prefix."""
        return str(self.word).removeprefix(SHIPPED_PREFIX)


def choose(source: str | Path, out: Path | None = None) -> ChosenSource:
    """Decide what a word is: a recipe, a YAML file, a run's folder (or its run.yaml), a trained run of dumo's, images.

    `out` is the folder that was given to train in: a recipe's name means the run there, where that folder has the same
    name, as when `train digits --out digits` is typed again. Raises UserError where ./NAME holds a run or images and
    NAME is a recipe, too, for a variable in a path that is not set, and for the folder of a pipeline of diffusers.
    """
    if out is not None and source in recipes.names() and out == Path(source) and (out / RUN_FILE).is_file():
        return ChosenSource("run", f"./{source}", out)
    recipe = _recipe_of(source)
    if recipe is not None:
        return ChosenSource("recipe", source, Path(RUNS_FOLDER) / recipe)
    trained_name = trained_name_of(source)
    if trained_name is not None:
        return ChosenSource("trained", source, Path(RUNS_FOLDER) / trained_name)
    if not str(source):
        raise UserError(f"the source is empty: {_SOURCE_FIX}, or a folder of images")
    path = user_path(str(source), "the source")
    if os.path.isfile(path):  # False for a name that is too long
        if is_table(path):
            return ChosenSource("images", source, folder_of_images(source))
        if path.name == RUN_FILE:
            return ChosenSource("run", source, path.parent, is_continued=out is None or out == path.parent)
    elif os.path.isdir(path):
        if (path / RUN_FILE).is_file():
            return ChosenSource("run", source, path, is_continued=out is None or out == path)
        from dumo.io.hub import INDEX

        if (path / INDEX).is_file():
            raise UserError(f"{source} is the pipeline of a model, not a run or images: {_pipeline_fix(str(source))}")
        return ChosenSource("images", source, folder_of_images(source))
    return ChosenSource("file", source, Path(RUNS_FOLDER) / path.stem)


def folder_of_images(place: str | Path) -> Path:
    """The folder runs/NAME to train in, by the name of the folder or file of images."""
    path = user_path(str(place), "the images").resolve()
    name = path.stem if path.is_file() else path.name  # of a folder a dot is no suffix
    return Path(RUNS_FOLDER) / name


def settings_of_images(tree: dict[str, Any], texts: Sequence[str], place: str | None = None) -> list[str]:
    """Settings of a run of images, each a.b=c, for a run of this tree: of latents, data.side is data.images.side.

    `place` is set in it, too, where it is given.
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
    """The name of the recipe that a source means; None: it is a path. A `Path` that exists is always a path.

    Raises UserError where ./NAME holds a run or images: then either may be meant.
    """
    if isinstance(source, Path) and os.path.exists(source):
        return None
    return _find_shipped_name(str(source), recipes.names(), images=True)


def trained_name_of(source: str | Path) -> str | None:
    """The name of the trained run, among those that come with dumo, that a source means; None: it is a path.

    A `Path` to the folder of a run is that folder. Raises UserError where ./NAME holds a run: then either may be meant.
    """
    if isinstance(source, Path) and (source / RUN_FILE).is_file():
        return None
    return _find_shipped_name(str(source), trained.names())


def _find_shipped_name(source: str, names: Collection[str], *, images: bool = False) -> str | None:
    """The one of `names`, of what dumo ships, that a source means; None: it is a path.

    Raises UserError where ./NAME holds a run (with `images`, also images): then either may be meant.
    """
    name = source.removeprefix(SHIPPED_PREFIX)
    if name not in names:
        return None
    if name == source:
        content = find_content(Path(source), images=images)
        if content is not None:
            content_text = "a run" if content == "run" else "images"
            raise UserError(
                f"{source} may be what dumo brings by this name, or the folder here, which holds {content_text}: write "
                f"{SHIPPED_PREFIX}{source} for dumo's, or ./{source} for the folder"
            )
    return name


def read(source: str | Path) -> RunText:
    """What a source says, over its bases. Raises UserError where there is none, or it cannot be read.

    In a text, ~ and $NAMES of environment variables are expanded; a `Path` is taken as it is.
    """
    recipe = _recipe_of(source)
    if recipe is not None:
        name = f"recipe {recipe}"
        return RunText(_merge_over_base(deepcopy(parse_recipe(recipe)), name, None), name)
    trained_name = trained_name_of(source)
    if trained_name is not None:
        return read_file(trained.folder(trained_name) / RUN_FILE)
    path = source if isinstance(source, Path) else user_path(source, "the source")
    file = find_run_file(path)
    if file is not None:
        from dumo.io.hub import SUFFIX

        if file.suffix == SUFFIX:
            from dumo.encoders.singlefile import unpack_hint  # slow to import

            raise UserError(f"{unpack_hint(file)}, and give it to a recipe: {_pipeline_fix('DIR')}")
        return read_file(file)
    if os.path.isdir(path):  # False for a name that is too long
        raise UserError(f"{source} is a folder without a {RUN_FILE}: {_SOURCE_FIX}")
    if "://" in str(source):
        raise UserError(
            f"{brief(source)} is an address, and dumo reads folders and files of this machine: fetch it, unpack it, "
            "and give its folder"
        )
    fetch = _fetch_hint(str(source))
    if fetch:
        raise UserError(fetch)
    raise UserError(f"there is no recipe, file or run's folder '{brief(source)}'; {_hint(str(source))}")


def read_file(file: Path) -> RunText:
    """What a YAML file says, over its bases; in a run.yaml, with the latents and texts next to it. Raises UserError."""
    text = parse_text(_yaml_text(file), file)
    if file.name == RUN_FILE:
        folder = file.absolute().parent
        _follow_moved_folder(text.tree, ["data"], Path(trained.LATENTS_FOLDER).name, folder)
        _follow_moved_folder(text.tree, ["net", "texts"], TEXTS_FOLDER, folder)
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


def without_resolved(text: RunText) -> RunText:
    """The text of a run without what was found on its files, for a new run of its settings."""
    tree = dict(text.tree)
    tree.pop(RESOLVED_KEY, None)
    return replace(text, tree=tree)


def parse_text(text: str, file: Path) -> RunText:
    """What the text of a YAML file says, over its bases. Raises UserError."""
    tree, changed = _parse_file(text, file)
    return RunText(_merge_over_base(tree, str(file), file), str(file), tuple(changed))


def _yaml_text(file: Path) -> str:
    """The text of a YAML file. Raises UserError for another suffix, too many bytes, or no UTF-8."""
    suffix = file.suffix.lower()
    if suffix in _ARCHIVES:
        raise UserError(f"{file} is an archive: unpack it, and give its folder")
    if is_image(file):
        raise UserError(f"{file} is one image: give the folder that it is in")
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file} is no YAML file: {_SOURCE_FIX}")
    return read_text(file, _SOURCE_FIX, MAX_BYTES)


def _parse_file(text: str, file: Path) -> tuple[dict[str, Any], list[RecordedChange]]:
    """The tree that a file's text holds, and what had changed in it. Raises UserError."""
    tree = _parse_mapping(text, str(file))
    changed = _take_changed(tree, str(file))
    _take_format(tree, file)
    return tree, changed


def _merge_over_base(
    tree: dict[str, Any], name: str, file: Path | None, derived: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A tree over its base, which may have a base itself; `derived` are the files and recipes whose base this is."""
    if "base" not in tree:
        return tree
    place = str(file.resolve()) if file else name
    if place in derived:
        raise UserError(f"{name}: base goes round in a circle: {' -> '.join((*derived, place))}")
    base_tree, base_name, base_file = _read_base(tree.pop("base"), name, file)
    merged_base = _merge_over_base(base_tree, base_name, base_file, (*derived, place))
    try:
        return merge(merged_base, tree)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _read_base(base: object, name: str, file: Path | None) -> tuple[dict[str, Any], str, Path | None]:
    """The tree, the name and the file of a base: a recipe, or what lies at a path next to the file that names it.

    ${NAME:-recipe}, as a shell reads it: what lies where the variable says, from here, or the recipe where it is unset.
    """
    word = base if isinstance(base, str) else yaml_text(base)
    folder = file.parent if file else None  # in which its path begins; None: that of a recipe is no path
    variable = _BASE_VARIABLE.fullmatch(word)
    if variable:
        word = os.environ.get(variable[1]) or variable[2]
        base = word
        folder = Path()  # the working folder
        name = f"{name}: ${variable[1]}"
    if isinstance(base, str):
        recipe = base.removeprefix(SHIPPED_PREFIX)
        if recipe in recipes.names():  # whatever lies next to the file
            return deepcopy(parse_recipe(recipe)), f"recipe {recipe}", None
        base_file = find_run_file(folder / user_path(base, "base")) if folder is not None else None
        if base_file:
            tree, _ = _parse_file(_yaml_text(base_file), base_file)
            tree.pop(RESOLVED_KEY, None)  # of that run's files
            return tree, str(base_file), base_file
    raise UserError(
        f"{name}: base: there is no recipe '{brief(word)}', nor a file or run's folder there; {_hint(word)}"
    )


def _take_format(tree: dict[str, Any], file: Path) -> None:
    """Remove the format from the tree of a file. Raises UserError for another than ours."""
    default = 1 if file.name == RUN_FILE and "base" not in tree else FORMAT
    file_format = tree.pop(FORMAT_KEY, default)
    if file_format != FORMAT:
        raise UserError(
            f"{file} is of format {brief(yaml_text(file_format))}, and this dumo reads {FORMAT}: take the dumo that "
            f"wrote it, for format 1 that of 2026-11-22 (commit 9ebbef4). A {RUN_FILE} of your own begins with "
            f"{FORMAT_KEY}: {FORMAT}"
        )


def _take_changed(tree: dict[str, Any], name: str) -> list[RecordedChange]:
    """Remove the changes from a tree, and return them."""
    try:
        return TypeAdapter(list[RecordedChange]).validate_python(tree.pop(CHANGED_KEY, []))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, (CHANGED_KEY, *first["loc"])))
        raise UserError(
            f"{name}: {field}: {first['msg']}: it lists step, field, was and now of each change; mend or remove it"
        ) from error


@cache
def parse_recipe(name: str) -> dict[str, Any]:
    """The tree of a shipped recipe, which no caller may change, since it is kept: take a copy to do so."""
    return _parse_mapping(recipes.text(name), f"recipe {name}")


def _parse_mapping(text: str, name: str) -> dict[str, Any]:
    """The mapping that YAML text holds. Raises UserError, after the `name` of its source, for anything else."""
    tree = parse_mapping(text, name, "run", "as `dumo show digits` prints it")
    tree.pop(GROUP_KEY, None)  # of a recipe in the list of recipes, no field of a run
    return tree


def _fetch_hint(name: str) -> str:
    """What a source that is nowhere here may be on the Hugging Face hub, and what to type; "": nothing."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or is_table(path) or path.parent == Path(RUNS_FOLDER):
        return ""
    from dumo.io.hub import fetch_hint, published_name

    fetch = fetch_hint(name)
    if not fetch:
        return ""
    recipe = _recipe_of_pipeline(published_name(name)) or _DEFAULT_TUNING_RECIPE
    return f"{fetch}, and give it to a recipe: {_pipeline_fix(path.name, recipe)}"


def _pipeline_fix(folder: str, recipe: str = _DEFAULT_TUNING_RECIPE) -> str:
    """How a recipe is given the folder of a pipeline, in words."""
    setting = shell_settings(f"pipeline={yaml_text(folder)}")
    return f"dumo encode {recipe} {setting}, then dumo train {recipe} {setting}"


def _recipe_of_pipeline(name: str) -> str:
    """The first recipe that tunes a published pipeline; "": none names it."""
    for recipe in recipes.names():
        pipeline = parse_recipe(recipe).get("pipeline")
        if isinstance(pipeline, dict) and pipeline.get("source") == name:
            return recipe
    return ""


def _hint(name: str) -> str:
    """The end of a message that there is no source of this name: what is near to it, and how to list recipes."""
    from dumo.config.suggestion import nearest_few

    valid_names = [*recipes.names(), *list_sources(Path(name).parent), *list_run_folders(Path(RUNS_FOLDER))]
    return f"{nearest_few(name, valid_names)}`dumo recipes` lists all"
