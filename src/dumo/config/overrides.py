"""Apply overrides `field=value` to a run, from the command line, a plan or Python.

    train.steps=500                 a field, by its dotted path, and its value in YAML
    steps=500 lr=1e-4               short forms (SHORT_FORMS)
    net=unet                        a kind alone: the part begins with the defaults of this kind
    objective=meanflow              also keeps the label dropout and the guidance, and samples by a solver that suits

`full_overrides` writes short forms and kinds out, `override` sets the fields in a tree of plain values, and `field_of`
and `sets_field` tell which field an override sets.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import yaml

from dumo.config import trust
from dumo.config.change import has_other_kind
from dumo.config.spec import Run
from dumo.error import UserError
from dumo.io.read import brief
from dumo.io.yaml import parse_yaml, yaml_text
from dumo.types import Spec
from dumo.types.outside import OUTSIDE, branch, import_class, members

FieldPath = tuple[str, ...]  # the names in a dotted path

# Short forms of common fields.
SHORT_FORMS = {
    "steps": "train.steps",
    "lr": "train.optimizer.lr",
    "batch": "train.batch",
    "seed": "train.seed",
    "minutes": "train.minutes",
}
# The default kind of items in these lists.
DEFAULT_KINDS: dict[FieldPath, str] = {("train", "ema"): "exponential"}
# Fields that are kept when the objective changes, because they belong to the comparison and not to the loss.
SHARED_BY_OBJECTIVES = ("drop", "guide")
# Values that turn guidance off where it is not the field `guide`.
UNGUIDED = {"scale": 1.0, "w": None}


def full_overrides(words: Iterable[str]) -> list[str]:
    """Expand short forms and bare kinds in overrides `a.b=c`, e.g. net=unet to net.kind=unet.

    Raises UserError for an invalid override.
    """
    return [f"{'.'.join(path)}={yaml_text(value)}" for path, value in map(_parse, words)]


def override(tree: dict[str, Any], words: Iterable[str]) -> None:
    """Apply overrides `a.b=c` to the tree in place. The last of several overrides for a field wins.

    Otherwise their order does not matter: short paths are set before long ones, and a part's `kind` before its other
    fields. Raises UserError for a word without `=`, a path that leads nowhere, or two that contradict each other.
    """
    values = dict(map(_parse, words))
    for path in sorted(values, key=_order):
        for length in range(1, len(path)):
            parent = path[:length]
            if parent in values and values[parent] is None:
                raise UserError(
                    f"{'.'.join(parent)}=null removes the parent of {'.'.join(path)}: remove one of the two"
                )
        _put(tree, path, values[path])


def field_of(word: str) -> str:
    """Return the dotted path of the field that an override, a.b=c, sets."""
    return word.partition("=")[0]


def sets_field(words: Sequence[str], field: str) -> bool:
    """Whether one of these overrides, each a.b=c, sets exactly this field: data=... does not set data.side."""
    return any(field_of(word) == field for word in words)


def _parse(word: str) -> tuple[FieldPath, object]:
    """Parse an override 'a.b=c' into path and value. Raises UserError for another format."""
    dotted, sign, right = word.partition("=")
    if not sign or not dotted:
        typed = brief(word) or "an empty text"
        raise UserError(f"{typed} is not field=value: set a field such as steps=500, and the folder with --out")
    try:
        value = parse_yaml(right)
    except yaml.YAMLError as error:
        raise UserError(f"{brief(word)}: '{brief(right)}' is not a YAML value") from error
    path = tuple(SHORT_FORMS.get(dotted, dotted).split("."))
    # A string for a part is its kind, or its source for a pipeline, which has no kinds.
    if isinstance(value, str):
        fields = _fields_of_part(path)
        for name in ("kind", "source"):
            if name in fields:
                return (*path, name), value
    return path, value


def _fields_of_part(path: FieldPath) -> set[str]:
    """Return the field names of the part at a path, over all kinds; empty for a plain value."""
    specs: list[type[Spec]] = [Run]
    for name in path:
        fields = [spec.model_fields[name] for spec in specs if name in spec.model_fields]
        # An item of a list has the list's annotation, because `members` looks inside it.
        if not name.isdecimal():
            specs = [member for field in fields for member in members(field.rebuild_annotation())]
    return {name for spec in specs for name in spec.model_fields}


def _order(path: FieldPath) -> tuple[int, bool]:
    """Return a sort key: short paths first, and `kind` before other fields."""
    return len(path), path[-1] != "kind"


def _put(tree: dict[str, Any], path: FieldPath, value: object) -> None:
    """Set the value at a path in place. Setting another kind drops the other fields of its part."""
    node: Any = tree
    for i, parent in enumerate(path[:-1]):
        node = _step(node, parent, ".".join(path[: i + 1]))
    last = path[-1]
    if isinstance(node, list):
        node[_list_index(node, last, ".".join(path))] = value
        return
    if last == "kind" and has_other_kind(node, value, DEFAULT_KINDS.get(path[:-2])):
        kept = _shared_fields(node, value) if path == ("objective", "kind") else {}
        node.clear()
        node |= kept
    node[last] = value


def _shared_fields(objective: dict[str, Any], kind: object) -> dict[str, Any]:
    """Return the fields of an objective that another kind keeps; {} for an unknown kind, which validation reports.

    If no conditions are dropped, the other kind is not guided by default, because guidance needs V(null).
    """
    fields: set[str] = set()
    if branch({"kind": kind}) == OUTSIDE:
        with suppress(UserError):
            trust.require([str(kind)], "")
            fields = {*import_class(str(kind)).model_fields}
    for spec in members(Run.model_fields["objective"].rebuild_annotation()):
        if spec.model_fields["kind"].default == kind:
            fields = {*spec.model_fields}
    kept = {name: objective[name] for name in SHARED_BY_OBJECTIVES if name in objective and name in fields}
    if kept.get("drop") == 0:
        kept |= {name: value for name, value in UNGUIDED.items() if name in fields}
    return kept


def _step(node: dict[str, Any] | list[Any], key: str, path: str) -> Any:  # noqa: ANN401, a YAML tree
    """Return the part of `node` under `key`; a missing one is made, and left to validation.

    `path` leads to it, for errors.
    """
    if isinstance(node, dict) and node.get(key) is None:  # missing, or null
        node[key] = {}
    child = node[_list_index(node, key, path)] if isinstance(node, list) else node[key]
    if not isinstance(child, dict | list):
        raise UserError(f"{path} is {brief(yaml_text(child))}, a value without fields of its own")
    return child


def _list_index(node: list[Any], key: str, path: str) -> int:
    """Parse `key`, the last part of a path, as an index into a list. Raises UserError for an invalid index."""
    if key not in [str(i) for i in range(len(node))]:
        fix = f"give a place from 0 to {len(node) - 1}" if node else "set it whole, as [...]"
        raise UserError(f"{brief(path)}: this is a list of {len(node)}; {fix}")
    return int(key)
