"""Where a run is read from: a recipe, a YAML file or a run's folder; and the base that a file may name (ADR 0030)."""

from pathlib import Path
from typing import Any

import yaml

from dumo import recipes
from dumo.config.change import merge, shown
from dumo.config.error import nearest_few
from dumo.config.format import Noted, take, take_changed, upgrade
from dumo.io.path import user_path
from dumo.io.text import brief, read_text
from dumo.io.yaml import parse
from dumo.types import UserError

FILE = "run.yaml"  # the run, in its folder
MOST = 2**24  # bytes of a file: ours; the names of 20,000 classes are half a million


def read(source: str) -> tuple[dict[str, Any], str]:
    """The tree of plain values that a source holds, put over its base; and what to call it. Raises UserError."""
    file = _file(Path(source))
    if file is not None:
        tree, name = _tree(file), str(file)
    elif source in recipes.names():
        tree, name = _packaged(source), f"recipe {source}"
    elif Path(source).is_dir():
        raise UserError(f"{source} is a folder without a {FILE}: give a run's folder, a recipe or a YAML file")
    else:
        raise UserError(f"there is no recipe, file or run's folder '{source}'; {_hint(source)}")
    if "base" in tree:
        base = _base(tree.pop("base"), name, file)
        try:
            tree = merge(base, tree)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return tree, name


def format_of(folder: Path) -> int:
    """The format that a folder's run.yaml was written in. Raises UserError as `read`."""
    file = folder / FILE
    return take(_plain(file), str(file), recorded=True)


def noted(folder: Path) -> list[Noted]:
    """What was changed in a folder's run while it trained, the first first. Raises UserError as `read`."""
    file = folder / FILE
    return take_changed(_plain(file), str(file))


def _base(base: object, name: str, file: Path | None) -> dict[str, Any]:
    """The tree of a base: of a recipe; or of what lies at a path beside `file`, if a file is what names it."""
    if not isinstance(base, str):
        raise UserError(f"{name}: base is {brief(shown(base))}: name a recipe, a YAML file or a run's folder")
    if base in recipes.names():
        tree = _packaged(base)
        if file and "base" in tree:  # to a user's file a packaged recipe is whole
            tree = merge(_packaged(tree.pop("base")), tree)
    elif file and (found := _file(file.parent / user_path(base, "base"))):
        tree = _tree(found)
    else:
        raise UserError(
            f"{name}: base: there is no recipe '{brief(base)}', nor a file or run's folder there; {_hint(base)}"
        )
    if "base" in tree:
        raise UserError(
            f"{name}: base '{base}' has a base itself, '{brief(tree['base'])}', and a base must be whole: run "
            f"dumo show {base} --yaml > base.yaml, then set base: base.yaml"
        )
    return tree


def _file(path: Path) -> Path | None:
    """The file that a path names, or the run.yaml of a folder; None where there is none."""
    file = path / FILE if path.is_dir() else path
    return file if file.is_file() else None


def _tree(file: Path) -> dict[str, Any]:
    """What a file holds, in this format, without saying so."""
    tree = _plain(file)
    take_changed(tree, str(file))
    if take(tree, str(file), recorded=file.name == FILE) == 1:
        upgrade(tree)
    return tree


def _plain(file: Path) -> dict[str, Any]:
    """What a file holds, as it stands there."""
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file} is no YAML file: give a run's folder, a recipe or a YAML file")
    return _mapping(read_text(file, "give a run's folder, a recipe or a YAML file", MOST), str(file))


def _packaged(name: str) -> dict[str, Any]:
    return _mapping(recipes.text(name), f"recipe {name}")


def _mapping(text: str, name: str) -> dict[str, Any]:
    try:
        tree = parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {brief(' '.join(str(error).split()), 1000)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} holds no run: it must map names to values, as `dumo show digits` prints it")
    return tree


def _hint(name: str) -> str:
    return f"{nearest_few(name, recipes.names())}`dumo recipes` lists all"
