"""The JSON schema of recipes, for editors: names are completed, and wrong ones marked, while a file is written."""

import json
from typing import Any, cast

from dumo.config import outline
from dumo.config.source import CHANGED_KEY, FORMAT_KEY
from dumo.config.spec import Run


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe. No field is required, since a file may have a base and say only what it changes."""
    tree = cast("dict[str, Any]", _loosen(Run.model_json_schema()))
    tree["title"] = "A recipe of dumo"
    tree["properties"]["base"] = {"type": "string", "description": "A recipe's name, or a file or run's folder here."}
    tree["properties"] |= {FORMAT_KEY: {"type": "integer"}, CHANGED_KEY: {"type": "array"}}  # keys of a run.yaml
    return tree


def outline_text() -> str:
    """The text of outline.json (`dumo.config.outline`), with a line for the hash and for each part of a run."""
    tree = outline.pruned_schema(_loosen(Run.model_json_schema()))
    parts = tree.pop(outline.DEFINITIONS)
    lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in sorted(parts.items())]
    definitions = ",\n".join(lines)
    fields = json.dumps(tree).removesuffix("}")
    declarations_hash = json.dumps(outline.declarations_hash(outline.PACKAGE))
    hash_line = f'"{outline.HASH_KEY}": {declarations_hash}'
    return f'{fields},\n{hash_line},\n"{outline.DEFINITIONS}": {{\n{definitions}\n}}}}\n'


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
