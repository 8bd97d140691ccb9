"""Change a run's tree of plain values: a file's changes to its base (`merge`), and --set (`override`; ADR 0002).

Both keep one rule: a part with another `kind` begins with that kind's defaults; fields of the old kind are dropped.
"""

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from dumo.io.read import brief
from dumo.io.yaml import dump, parse
from dumo.types import UserError

Parts = tuple[str, ...]  # of a dotted path


def merge(base: dict[str, Any], change: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The base with the changes of a file, as a new tree. `where` is the dotted path to both.

    Mappings are merged key by key; anything else, an empty mapping and another kind replace what was there. Raises
    UserError if fields are given to a value of the base that has none.
    """
    merged = dict(base)
    for key, new in change.items():
        old = base.get(key)
        if isinstance(new, dict) and old is not None and not isinstance(old, dict):
            raise UserError(
                f"{where}{key} is {brief(shown(old))} in the base, a value without fields: write them out there"
            )
        if isinstance(new, dict) and new and isinstance(old, dict) and not _another(old, new.get("kind")):
            merged[key] = merge(old, new, f"{where}{key}.")
        else:
            merged[key] = new
    return merged


def override(tree: dict[str, Any], texts: Sequence[str]) -> None:
    """Set values in place, each from `a.b=c`; of two for the same field the last one holds.

    Higher parts of the tree are set first, and a part's `kind` before its other fields, so the order does not matter
    else. Raises UserError for a text without `=`, a path that leads nowhere, or two that contradict each other.
    """
    values = dict(_split(text) for text in texts)
    for path in sorted(values, key=lambda path: (len(path), path[-1] != "kind")):
        for length in range(1, len(path)):
            parent = path[:length]
            if parent in values and values[parent] is None:
                raise UserError(
                    f"--set {'.'.join(parent)}=null takes away what --set {'.'.join(path)} is a part of: leave out one "
                    "of them"
                )
        _put(tree, path, values[path])


def shown(value: object) -> str:
    """A value as YAML, on one line."""
    return dump(to_jsonable_python(value), flow=True, width=10_000).removesuffix("...\n").strip()


def _another(part: dict[str, Any], kind: object) -> bool:
    """Whether `kind` is another one than the part's."""
    return kind is not None and part.get("kind", kind) != kind


def _split(text: str) -> tuple[Parts, object]:
    """The parts of the path and the value of 'a.b=c'."""
    dotted, sign, right = text.partition("=")
    if not sign or not dotted:
        raise UserError(f"--set {brief(text)}: write it as a.b=c, for example --set train.steps=2000")
    try:
        return tuple(dotted.split(".")), parse(right)
    except yaml.YAMLError as error:
        raise UserError(f"--set {brief(text)}: '{brief(right)}' is not a YAML value") from error


def _put(tree: dict[str, Any], path: Parts, value: object) -> None:
    """Set one value in place; another kind drops the other fields of its part."""
    node: Any = tree
    for i, parent in enumerate(path[:-1]):
        node = _step(node, parent, ".".join(path[: i + 1]))
    last = path[-1]
    if isinstance(node, list):
        node[_place(node, last, ".".join(path))] = value
        return
    if last == "kind" and _another(node, value):
        node.clear()
    node[last] = value


def _step(node: dict[str, Any] | list[Any], key: str, path: str) -> Any:  # noqa: ANN401, a YAML tree
    """One level down; a missing level is made, and left to validation."""
    if isinstance(node, dict) and node.get(key) is None:  # missing, or null
        node[key] = {}
    child = node[_place(node, key, path)] if isinstance(node, list) else node[key]
    if not isinstance(child, dict | list):
        raise UserError(f"{path} is {brief(shown(child))}, a value without fields of its own")
    return child


def _place(node: list[Any], key: str, path: str) -> int:
    """The index into a list that the last part of a path says."""
    if key not in [str(place) for place in range(len(node))]:
        fix = f"give a place from 0 to {len(node) - 1}" if node else "set it whole, as [...]"
        raise UserError(f"{brief(path)}: this is a list of {len(node)}; {fix}")
    return int(key)
