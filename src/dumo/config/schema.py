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
        return [_loosened(item) for item in cast("list[object]", part)]
    if not isinstance(part, dict):
        return part
    loosened: dict[str, object] = {}
    for key, value in cast("dict[str, object]", part).items():
        if key in ("required", "discriminator"):
            continue
        loosened["anyOf" if key == "oneOf" else key] = _loosened(value)
    if "type" in loosened and loosened.get("default", ...) is None:
        loosened["type"] = [loosened["type"], "null"]
    return loosened
