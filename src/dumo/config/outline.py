"""The names of all fields, kinds and choices of a run, in outline.json: known without torch, which all specs import.

`python tools/outline.py` writes the file from the specs, and a test compares the two. It is their JSON schema
(`dumo.config.schema`) without what no check here reads. `dumo.config.fault` goes through a run by it.

The file holds a hash of the statements that declare a run (`dumo.config.declaration`). Once one of them has changed, as
where somebody adds an objective, `is_current` says so, and the specs alone decide.

- `root` is the schema of a run; `choices`, `kinds_of` and `kinds_at` go down from it.
- `paths_of` and `field_names` look fields up by name.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from dumo.config.declaration import declarations_hash

Schema = dict[str, Any]  # JSON schema
FILE = Path(__file__).with_name("outline.json")
DEFINITIONS = "$defs"
HASH_KEY = "declared"  # in the file, of `dumo.config.declaration.declarations_hash`
PACKAGE = Path(__file__).parents[1]


@cache
def root() -> Schema:
    """The schema of a whole run."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def is_current() -> bool:
    """Whether the fields and kinds are declared as they were when the file was written. Takes half a second."""
    return root()[HASH_KEY] == declarations_hash(PACKAGE)


def choices(schema: Schema) -> Iterator[Schema]:
    """The schemas of which a value has to keep one, without references and unions."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        yield from choices(root()[DEFINITIONS][name])
    elif "anyOf" in schema:
        for choice in schema["anyOf"]:
            yield from choices(choice)
    elif isinstance(schema.get("type"), list):
        for type_name in schema["type"]:
            yield {**schema, "type": type_name}
    else:
        yield schema


def kinds_of(schema: Schema) -> list[str]:
    """The kinds that a part of this schema may have; []: it has no field `kind`, or a class from outside may be."""
    kind = schema.get("properties", {}).get("kind", {})
    return [kind["const"]] if "const" in kind else kind.get("enum", [])


def kinds_at(path: str) -> list[str]:
    """The kinds that a part of a run may have, by its dotted path, through parts that have one schema each."""
    allowed = [root()]
    for name in path.split("."):
        (parent,) = [choice for choice in allowed if "properties" in choice]
        allowed = [*choices(parent["properties"][name])]
    return [kind for choice in allowed for kind in kinds_of(choice)]


def paths_of(name: str) -> list[str]:
    """The dotted paths of the fields with this name in the parts of a run, in the order of the parts."""
    paths: list[str] = []
    for part, schema in root()["properties"].items():
        if any(name in choice.get("properties", {}) for choice in choices(schema)):
            paths.append(f"{part}.{name}")
    return paths if name != "kind" else []


def field_names() -> list[str]:
    """The names of the fields of all parts of a run, of whatever kind."""
    names: list[str] = []
    for schema in root()["properties"].values():
        for choice in choices(schema):
            names.extend(choice.get("properties", {}))
    return names
