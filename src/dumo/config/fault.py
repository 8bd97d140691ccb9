"""Find the fields of a run that no spec has, and values of the wrong type, without torch: by their outline.

`faults` is the entrance. It finds fewer mistakes than `dumo.config.load.parse`, which validates the whole tree, and no
others: what it cannot tell, such as fields of a class from outside, it leaves to that. So it does with everything while
the outline is not that of the specs. What writes the lines is imported where a mistake is found.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import to_json

from dumo.config.change import SHORTHANDS
from dumo.config.outline import Schema, choices, is_current, kinds_of, root
from dumo.io.read import brief

_TYPES = {"integer": int, "number": float, "string": str, "boolean": bool, "null": None}  # of values without fields
_BOUNDS = {  # of numbers: what pydantic calls them, by the keywords of JSON schema
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
}


def faults(tree: dict[str, Any]) -> list[str]:
    """A line for each mistake in the plain values of a run, or of some of its parts; []: none is found."""
    lines = list(_part_faults(tree, root(), ""))
    return lines if lines and is_current() else []


def _part_faults(part: dict[str, Any], schema: Schema, path: str) -> Iterator[str]:
    """The mistakes in the fields of a part whose kind is known. `path` leads to it; "": it is the whole run."""
    fields = schema.get("properties", {})
    if not fields or schema.get("additionalProperties", True) is not False:
        return
    for name, value in part.items():
        field_path = f"{path}.{name}" if path else str(name)
        if name in fields:
            yield from _value_faults(value, [*choices(fields[name])], field_path)
        else:
            from dumo.config import line

            yield line.unknown_key(brief(field_path), str(name), fields)


def _value_faults(value: object, allowed: list[Schema], path: str) -> Iterator[str]:
    """The mistakes in a value of which one of the `allowed` schemas should hold."""
    parts = [schema for schema in allowed if schema.get("type") == "object"]
    lists = [schema for schema in allowed if schema.get("type") == "array"]
    is_plain = not parts and not lists and all("type" in schema for schema in allowed)
    if isinstance(value, dict) and parts:
        yield from _mapping_faults(value, parts, path)
    elif isinstance(value, list) and len(lists) == 1 and not parts:
        yield from _list_faults(value, lists[0], path)
    elif isinstance(value, str) and parts and not _may_be_text(allowed, path):
        fields = {name for schema in parts for name in schema.get("properties", {})}
        if "kind" in fields:
            from dumo.config import line

            yield line.no_mapping(path, value, fields if len(parts) == 1 else ())
    elif is_plain:
        yield from _plain_faults(value, allowed, path)


def _may_be_text(allowed: list[Schema], path: str) -> bool:
    """Whether a text may stand for a value that may be a part."""
    is_shorthand = tuple(path.split(".")) in SHORTHANDS
    return is_shorthand or any(schema.get("type") not in ("object", "null") for schema in allowed)


def _mapping_faults(part: dict[str, Any], allowed: list[Schema], path: str) -> Iterator[str]:
    """The mistakes in a part, which is of one of the `allowed` schemas: of the one with its kind."""
    kind = part.get("kind")
    if kind is None:
        if len(allowed) == 1:
            yield from _part_faults(part, allowed[0], path)
        return
    kinds = [known for schema in allowed for known in kinds_of(schema)]
    has_outside_classes = any(schema.get("additionalProperties") is True for schema in allowed)
    for schema in allowed:
        if kind in kinds_of(schema):
            yield from _part_faults(part, schema, path)
    if kinds and len(allowed) > 1 and isinstance(kind, str) and kind not in kinds:
        if has_outside_classes and ":" in kind:
            return
        if has_outside_classes:
            kinds.append("module:Class")
        from dumo.config import line

        yield line.unknown_kind(path, kind, kinds)


def _list_faults(values: list[Any], schema: Schema, path: str) -> Iterator[str]:
    """The mistakes in the items of a list. How many there may be is not checked."""
    by_place = schema.get("prefixItems", [])
    for place, value in enumerate(values):
        item = by_place[place] if place < len(by_place) else schema.get("items")
        if isinstance(item, dict):
            yield from _value_faults(value, [*choices(item)], f"{path}.{place}")


def _plain_faults(value: object, allowed: list[Schema], path: str) -> Iterator[str]:
    """What pydantic says of a value without fields, by the types and bounds of the `allowed` schemas."""
    annotation: Any = Union[tuple(_type_of(schema) for schema in allowed)]  # noqa: UP007, of a tuple
    try:
        TypeAdapter(annotation).validate_json(to_json(value, inf_nan_mode="constants"), strict=True)
    except ValidationError as error:
        from dumo.config import line

        for details in error.errors(include_url=False):
            yield line.wrong_value(path, details)


def _type_of(schema: Schema) -> Any:  # noqa: ANN401, an annotation
    """The annotation of a value without fields."""
    if "const" in schema:
        return Literal[schema["const"]]
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if schema["type"] not in ("integer", "number"):
        return _TYPES[schema["type"]]
    bounds: dict[str, Any] = {name: schema[keyword] for keyword, name in _BOUNDS.items() if keyword in schema}
    return Annotated[_TYPES[schema["type"]], Field(allow_inf_nan=False, **bounds)]
