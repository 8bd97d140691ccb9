"""The names of all fields, kinds and choices of a run, in outline.json: known without torch, which all specs import.

`python tools/outline.py` writes the file from the specs, and a test compares the two. It is their JSON schema
(`dumo.config.schema`) without what no check here reads. `dumo.config.fault` goes through a run by it.

The file holds a hash of the lines that declare fields and kinds. Once one of them has changed, as where somebody adds
an objective, `is_current` says so, and the specs alone decide.

- `root` is the schema of a run; `choices`, `kinds_of` and `kinds_at` go down from it.
- `paths_of` and `field_names` look fields up by name.
- `declarations_hash` and `pruned_schema` are for who writes the file.
"""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

Schema = dict[str, Any]  # JSON schema
FILE = Path(__file__).with_name("outline.json")
DEFINITIONS = "$defs"
HASH_KEY = "declared"  # in the file, of `declarations_hash`
PACKAGE = Path(__file__).parents[1]
_ASSIGNMENT = re.compile(r"^(?P<name>[A-Z]\w*)(: [^=\n]+)? = .*(\n[ )\]}].*)*", re.MULTILINE)  # of a module's constant
# Keywords of JSON schema that the file keeps.
_KEYWORDS = (
    *("$ref", "anyOf", "type", "const", "enum", "properties", "additionalProperties", "items", "prefixItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern"),
)


@cache
def root() -> Schema:
    """The schema of a whole run."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def is_current() -> bool:
    """Whether the fields and kinds are declared as they were when the file was written. Takes a fifth of a second."""
    return root()[HASH_KEY] == declarations_hash(PACKAGE)


@cache
def declarations_hash(package: Path) -> str:
    """A hash of the statements in a package that declare fields of specs, their kinds and the types that these name.

    The bounds and choices that those statements name may stand in any file: they are of the hash, too.
    """
    hash_of_statements = sha256()
    used_names: set[str] = set()
    texts = [file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))]
    for text in texts:
        if not re.search(r"Spec\b|SpecFamily|BaseModel", text):
            continue
        lines = text.splitlines()
        for statement in _declarations(ast.parse(text)):
            used_names |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            hash_of_statements.update("\n".join(lines[statement.lineno - 1 : statement.end_lineno]).encode())
    for text in texts:
        for assignment in _ASSIGNMENT.finditer(text):
            if assignment["name"] in used_names:
                hash_of_statements.update(assignment[0].encode())
    return hash_of_statements.hexdigest()


def _declarations(module: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a file that declare fields of its classes, its types and its tables of kinds, in order."""
    for statement in module.body:
        if isinstance(statement, ast.ClassDef):
            yield from (field for field in statement.body if isinstance(field, ast.AnnAssign))
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            if names & {"Literal", "Annotated", "MEMBERS"}:
                yield statement


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


def pruned_schema(schema: object, *, has_names: bool = False) -> Any:  # noqa: ANN401, a part of a JSON schema
    """A JSON schema with _KEYWORDS alone. `has_names`: the keys of this mapping are names of fields or definitions."""
    if isinstance(schema, list):
        return [pruned_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    pruned: Schema = {}
    for key, value in schema.items():
        if has_names or key in _KEYWORDS or key == DEFINITIONS:
            value_has_names = not has_names and key in ("properties", DEFINITIONS)
            pruned[key] = pruned_schema(value, has_names=value_has_names)
    return pruned
