"""Change a run's tree of plain values: a file's changes to its base (`merge`), and --set (`override`; ADR 0002).

Both keep one rule: a part with another `kind` begins with that kind's defaults; fields of the old kind are dropped.
`field_of` and `sets_field` tell which field a setting is of; `yaml_text` is a value as one would type it after the `=`.
"""

from collections.abc import Sequence
from typing import Any, cast

import yaml
from pydantic_core import PydanticSerializationError, to_jsonable_python

from dumo.error import UserError
from dumo.io.read import brief
from dumo.io.yaml import dump_yaml, parse_yaml

FieldPath = tuple[str, ...]  # the names in a dotted path
SHORTHANDS: dict[FieldPath, str] = {("pipeline",): "source"}  # parts that a text stands for: the field that it sets
# lists whose items need not say their kind: what it is then
DEFAULT_KINDS: dict[FieldPath, str] = {("train", "ema"): "exponential"}


def merge(base: dict[str, Any], change: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The base with the changes of a file, as a new tree. `where` is the dotted path to both, with a dot at its end.

    Mappings are merged key by key; anything else, an empty mapping and another kind replace what was there. Raises
    UserError if fields are given to a value of the base that has none.
    """
    merged = dict(base)
    for key, new in change.items():
        old = base.get(key)
        if isinstance(new, dict) and old is not None and not isinstance(old, dict):
            raise UserError(
                f"{where}{key} is {brief(yaml_text(old))} in the base, a value without fields: write them out there"
            )
        if isinstance(new, dict) and new and isinstance(old, dict) and not _has_other_kind(old, new.get("kind")):
            merged[key] = merge(old, new, f"{where}{key}.")
        else:
            merged[key] = new
    return merged


def override(tree: dict[str, Any], texts: Sequence[str]) -> None:
    """Set fields of the tree in place, each by a text `a.b=c`. Of two texts for one field the last one counts.

    Otherwise their order does not matter: short paths are set before long ones, and a part's `kind` before its other
    fields. Raises UserError for a text without `=`, a path that leads nowhere, or two that contradict each other.
    """
    values = dict(_split(text) for text in texts)
    for path, field in SHORTHANDS.items():
        if isinstance(values.get(path), str):  # written out, so that other fields of the part may be set, too
            values[path] = {field: values[path]}
    for path in sorted(values, key=_order):
        for length in range(1, len(path)):
            parent = path[:length]
            if parent in values and values[parent] is None:
                raise UserError(
                    f"{'.'.join(parent)}=null takes away what {'.'.join(path)} is a part of: leave out one of them"
                )
        _put(tree, path, values[path])


def field_of(setting: str) -> str:
    """The dotted path of the field that a setting, a.b=c, sets."""
    return setting.partition("=")[0]


def sets_field(texts: Sequence[str], field: str) -> bool:
    """Whether one of these settings, each a.b=c, sets exactly this field: data=... does not set data.side."""
    return any(field_of(text) == field for text in texts)


def yaml_text(value: object) -> str:
    """A value as YAML, on one line; numbers of NumPy and torch are written as those of Python.

    Raises PydanticSerializationError for a value that YAML does not have.
    """
    plain_value = to_jsonable_python(value, fallback=_plain_numbers)
    return dump_yaml(plain_value, flow=True, width=10_000).removesuffix("...\n").strip()


def _plain_numbers(value: object) -> object:
    """A number or an array of NumPy or torch as numbers of Python. Raises PydanticSerializationError for all else."""
    plain_value = value
    if hasattr(value, "tolist") and not isinstance(value, type):
        plain_value = cast(Any, value).tolist()
    if type(plain_value) is type(value):  # nothing was made plain; a long double stays one
        raise PydanticSerializationError(f"{brief(repr(value))} is no value of YAML")
    return plain_value


def _order(path: FieldPath) -> tuple[int, bool]:
    """A sort key: short paths first, and of paths of one length those to a `kind`."""
    return len(path), path[-1] != "kind"


def _has_other_kind(part: dict[str, Any], kind: object, default: str | None = None) -> bool:
    """Whether `kind` is given, and the part has a kind that is another; `default` is that of a part that says none."""
    return kind is not None and part.get("kind", default or kind) != kind


def _split(text: str) -> tuple[FieldPath, object]:
    """The path and the value of a text 'a.b=c'. Raises UserError for a text that is not written so."""
    dotted, sign, right = text.partition("=")
    if not sign or not dotted:
        typed = brief(text) or "an empty text"
        raise UserError(f"{typed} is no field and its value: write train.steps=2000")
    try:
        return tuple(dotted.split(".")), parse_yaml(right)
    except yaml.YAMLError as error:
        raise UserError(f"{brief(text)}: '{brief(right)}' is not a YAML value") from error


def _put(tree: dict[str, Any], path: FieldPath, value: object) -> None:
    """Set the value at a path in place. Setting another kind drops the other fields of its part."""
    node: Any = tree
    for i, parent in enumerate(path[:-1]):
        node = _step(node, parent, ".".join(path[: i + 1]))
    last = path[-1]
    if isinstance(node, list):
        node[_list_index(node, last, ".".join(path))] = value
        return
    if last == "kind" and _has_other_kind(node, value, DEFAULT_KINDS.get(path[:-2])):
        node.clear()
    node[last] = value


def _step(node: dict[str, Any] | list[Any], key: str, path: str) -> Any:  # noqa: ANN401, a YAML tree
    """The part of `node` under `key`; a missing one is made, and left to validation. `path` leads to it, for errors."""
    if isinstance(node, dict) and node.get(key) is None:  # missing, or null
        node[key] = {}
    child = node[_list_index(node, key, path)] if isinstance(node, list) else node[key]
    if not isinstance(child, dict | list):
        raise UserError(f"{path} is {brief(yaml_text(child))}, a value without fields of its own")
    return child


def _list_index(node: list[Any], key: str, path: str) -> int:
    """The index into a list that `key`, the last part of a path, says. Raises UserError for what is none."""
    if key not in [str(i) for i in range(len(node))]:
        fix = f"give a place from 0 to {len(node) - 1}" if node else "set it whole, as [...]"
        raise UserError(f"{brief(path)}: this is a list of {len(node)}; {fix}")
    return int(key)
