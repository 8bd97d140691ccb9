"""The JSON schema of recipes, for editors: names are completed, and wrong ones marked, while a file is written."""

from typing import Any, cast

from dumo.config import recipe_files
from dumo.config.source import FORMAT_KEY, GROUP_KEY, HASH_KEY, ORIGIN_KEY
from dumo.config.spec import Run


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe.

    No field is required, since a file may have a base and say only what it changes.
    """
    tree = cast("dict[str, Any]", _loosen(Run.model_json_schema()))
    tree["title"] = "A recipe of dumo"
    tree["properties"]["base"] = {"type": "string", "description": "The name of a recipe, or a file or run folder."}
    tree["properties"][GROUP_KEY] = {
        "enum": [*recipe_files.GROUPS],
        "description": "The heading in the list of recipes.",
    }
    # A run.yaml has these keys, too.
    tree["properties"] |= {
        FORMAT_KEY: {"type": "integer"},
        HASH_KEY: {"type": "string"},
        ORIGIN_KEY: {"type": "object"},
    }
    return tree


def _loosen(part: object) -> object:
    """Return a part of a schema, and all parts in it, with fewer rules.

    No field is required, a part without a `kind` may be of any kind, and null is valid where it is the default.
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
