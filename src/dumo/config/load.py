"""From a recipe's name, a file or a run's folder, and `a.b=c` overrides, to a run; and back to YAML."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from dumo import recipes
from dumo.config.error import explain, nearest
from dumo.config.spec import Run
from dumo.types import Spec, UserError

S = TypeVar("S", bound=Spec)

FILE = "run.yaml"  # the run, in its folder


def load(source: str, overrides: Sequence[str] = ()) -> Run:
    """Read a run: a recipe's name, a YAML file, or a folder with a run.yaml.

    Raises UserError, one line per mistake, each with its dotted path and the nearest valid name.
    """
    text, name = _find(source)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} holds no run: it must map names to values, as `dumo show digits` prints it")
    for text in overrides:
        override(tree, text)
    return parse(Run, tree, name)


def parse(spec: type[S], tree: object, name: str = "") -> S:
    """A tree of plain values as a spec. Raises UserError, one line per mistake, each after the name of a file."""
    try:
        return spec.model_validate(tree)
    except ValidationError as error:
        where = f"{name}: " if Path(name).suffix else ""
        raise UserError("\n".join(where + line for line in explain(error, spec).splitlines())) from error


def default_folder(source: str) -> Path:
    """The folder of a run where none is named: runs/NAME, or that of the run.yaml that `source` is or holds."""
    path = Path(source)
    if path.name == FILE:
        return path.parent
    return path if (path / FILE).is_file() else Path("runs") / path.stem


def dump(run: Run) -> str:
    """The complete run as YAML, which `load` reads back."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def difference(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    """A line per field that differs and may not, when a run is resumed."""
    for name, field in type(old).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            continue
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and type(before) is type(after):
            yield from difference(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}: {_show(before)} there, {_show(after)} asked"


def _find(source: str) -> tuple[str, str]:
    path = Path(source) / FILE if Path(source).is_dir() else Path(source)
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{source} is no YAML file: give a run's folder, a recipe or a YAML file")
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no text ({error}): give a run's folder, a recipe or a YAML file") from error
    if source in recipes.names():
        return recipes.text(source), f"recipe {source}"
    if Path(source).is_dir():
        raise UserError(f"{source} is a folder without a {FILE}: give a run's folder, a recipe or a YAML file")
    raise UserError(f"there is no recipe, file or run's folder '{source}'; {nearest(source, recipes.names())}")


def override(tree: dict[str, Any], text: str) -> None:
    """Set one value in place, from `a.b=c`. Raises UserError where it is none, or leads nowhere.

    A new `kind` starts from that kind's own defaults: the old kind's fields are dropped.
    """
    dotted, sign, right = text.partition("=")
    if not sign or not dotted:
        raise UserError(f"--set {text}: write it as a.b=c, for example --set train.steps=2000")
    try:
        value = yaml.safe_load(right)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: '{right}' is not a YAML value") from error
    *parents, last = dotted.split(".")
    node: Any = tree
    for i, parent in enumerate(parents):
        node = _step(node, parent, ".".join(parents[: i + 1]))
    if last == "kind" and isinstance(node, dict) and node.get("kind") != value:
        node.clear()
    if isinstance(node, list):
        _step(node, last, dotted)
        node[int(last)] = value
    else:
        node[last] = value


def _step(node: dict[str, Any] | list[Any], key: str, path: str) -> Any:  # noqa: ANN401, a YAML tree
    """One level down; a missing level is made, for the validation to judge."""
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            places = f"give a place from 0 to {len(node) - 1}" if node else "set it whole, as [...]"
            raise UserError(f"{path}: this is a list of {len(node)}; {places}")
        return node[int(key)]
    if node.get(key) is None:  # not there, or a part that may be none
        node[key] = {}
    child = node[key]
    if not isinstance(child, dict | list):
        raise UserError(f"{path} is {_show(child)}, a value without fields of its own")
    return child


def _show(value: object) -> str:
    return (
        yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )
