"""The JSON schema of recipes, for editors: names are completed, and wrong ones marked, while a file is written."""

import json
from typing import Any, cast

from dumo.config import outline, recipes
from dumo.config.declaration import declarations_hash
from dumo.config.source import CHANGED_KEY, FORMAT_KEY, GROUP_KEY
from dumo.config.spec import Run

# Keywords of JSON schema that outline.json keeps.
_KEYWORDS = (
    *("$ref", "anyOf", "type", "const", "enum", "properties", "additionalProperties", "items", "prefixItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern"),
)


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe. No field is required, since a file may have a base and say only what it changes."""
    tree = cast("dict[str, Any]", _loosen(Run.model_json_schema()))
    tree["title"] = "A recipe of dumo"
    tree["properties"]["base"] = {"type": "string", "description": "A recipe's name, or a file or run's folder here."}
    tree["properties"][GROUP_KEY] = {"enum": [*recipes.GROUPS], "description": "The heading in the list of recipes."}
    tree["properties"] |= {FORMAT_KEY: {"type": "integer"}, CHANGED_KEY: {"type": "array"}}  # keys of a run.yaml
    return tree


def outline_text() -> str:
    """The text of outline.json (`dumo.config.outline`), with a line for the hash and for each part of a run."""
    tree = _prune(_loosen(Run.model_json_schema()))
    parts = tree.pop(outline.DEFINITIONS)
    fields = ", ".join(_json_entry(name, value) for name, value in tree.items())
    hash_entry = _json_entry(outline.HASH_KEY, declarations_hash(outline.PACKAGE))
    part_entries = ",\n".join(_json_entry(name, part) for name, part in sorted(parts.items()))
    definitions = f'"{outline.DEFINITIONS}": {{\n{part_entries}\n}}'
    entries = ",\n".join([fields, hash_entry, definitions])
    return f"{{{entries}}}\n"


def _json_entry(name: str, value: object) -> str:
    """An entry of a JSON object, on one line."""
    return f"{json.dumps(name)}: {json.dumps(value)}"


def _loosen(part: object) -> object:
    """A part of a schema, and all parts in it, with fewer rules.

    No field is required, a part that names no `kind` may be of any, and null is valid where it is the default.
    """
    if isinstance(part, list):
        return [_loosen(item) for item in cast("list[object]", part)]
    if not isinstance(part, dict):
        return part
    loosened: dict[str, object] = {}
    for key, value in cast("dict[str, object]", part).items():
        if key in ("required", "discriminator"):
            continue
        loosened["anyOf" if key == "oneOf" else key] = _loosen(value)
    if "type" in loosened and loosened.get("default", ...) is None:
        loosened["type"] = [loosened["type"], "null"]
    return loosened


def _prune(schema: object, *, has_names: bool = False) -> Any:  # noqa: ANN401, a part of a JSON schema
    """A JSON schema with `_KEYWORDS` alone. `has_names`: its keys are names of fields or definitions."""
    if isinstance(schema, list):
        return [_prune(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    pruned: dict[str, Any] = {}
    for key, value in schema.items():
        if has_names or key in _KEYWORDS or key == outline.DEFINITIONS:
            value_has_names = not has_names and key in ("properties", outline.DEFINITIONS)
            pruned[key] = _prune(value, has_names=value_has_names)
    return pruned
