"""The JSON schema of recipes, for editors: names are completed, and wrong ones marked, while a file is written."""

from typing import Any, cast

from dumo.config.source import CHANGED, KEY
from dumo.config.spec import Run


def schema() -> dict[str, Any]:
    """Of a file that may have a base and say only what it changes: no field is required."""
    tree = cast("dict[str, Any]", _loosened(Run.model_json_schema()))
    tree["title"] = "A recipe of dumo"
    tree["properties"]["base"] = {"type": "string", "description": "A recipe's name, or a file or run's folder here."}
    tree["properties"] |= {KEY: {"type": "integer"}, CHANGED: {"type": "array"}}  # of a run.yaml
    return tree


def _loosened(part: object) -> object:
    """The same without required fields, any of the kinds where none is named, and null where it is the default."""
    if isinstance(part, list):
        return [_loosened(one) for one in cast("list[object]", part)]
    if not isinstance(part, dict):
        return part
    items = cast("dict[str, object]", part).items()
    names = {"oneOf": "anyOf"}
    found = {names.get(key, key): _loosened(value) for key, value in items if key not in ("required", "discriminator")}
    if "type" in found and found.get("default", ...) is None:
        found["type"] = [found["type"], "null"]
    return found
