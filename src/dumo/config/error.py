"""Say pydantic's errors as lines to act on: the dotted path, what is wrong, the nearest valid name.

`explain` writes a line for each error; `_locate` follows pydantic's location through the specs, so that a line can name
the field, what it may hold, and the names that are valid there (`dumo.config.suggestion`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dumo.config import line
from dumo.io.read import brief
from dumo.types.family import LazySpec, family_of
from dumo.types.outside import TAG

Location = tuple[int | str, ...]
MISSING = {  # by dotted path: what belongs into a field that has no default
    "data.root": ": where the images are, or the folder of latents that dumo encode writes",
    "pipeline.source": ": a folder of diffusers, or a published name (docs/pretrained.md)",
    "net.texts.root": ": the folder that dumo encode writes the table of captions into, e.g. runs/texts/mine",
    "teacher.source": ": the folder of a run that has a velocity",
}


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Pydantic's error as lines, one per mistake; `root` is the spec that was validated."""
    details = error.errors(include_url=False)
    parents = {detail["loc"][:-1] for detail in details}
    lines: list[str] = []
    for detail in details:
        # pydantic calls a list too short whose parts are wrong
        if detail["type"] != "too_short" or detail["loc"] not in parents:
            lines.append(_line(detail, root))
    return lines


@dataclass(frozen=True)
class _Field:
    """The field that an error is about."""

    path: str  # dotted, without pydantic's tags
    parent: type[BaseModel] | None  # the model whose field the last name of the path is, or is not
    own_fields: frozenset[str] | None  # of the spec with a `kind` that may stand there; None: none may


def _line(error: ErrorDetails, root: type[BaseModel]) -> str:
    """The line for one of pydantic's errors."""
    field = _locate(error["loc"], root)
    path = field.path
    value = error["input"]
    match error["type"]:
        case "extra_forbidden":
            return line.unknown_key(path, str(error["loc"][-1]), field.parent.model_fields if field.parent else ())
        case "union_tag_invalid":
            context = error.get("ctx", {})
            return line.unknown_kind(path, context["tag"], context["expected_tags"].replace("'", "").split(", "))
        case "union_tag_not_found":
            if value is None or isinstance(value, dict):
                return f"{path}.kind: missing; say which kind this is"
            return line.no_mapping(path, value)
        case "missing":
            return f"{path}: missing{MISSING.get(path, '')}"
        case "value_error":
            message = str(error.get("ctx", {})["error"])
            names_field = message.startswith(f"{path} ")
            return message if not path or names_field else f"{path}: {message}"
        case _:
            return line.wrong_value(path, error, fields=field.own_fields)


def _locate(loc: Location, root: type[BaseModel]) -> _Field:
    """The field at pydantic's location, which also has the tags of unions among its names."""
    names: list[str] = []
    annotation: Any = root
    parent: type[BaseModel] | None = None
    for part in loc:
        if part == TAG:  # a class from outside: what follows is its own
            annotation = Any
            continue
        member = _member(annotation, part)
        if member:
            annotation = member
            continue
        models = list(_models(annotation))
        if isinstance(part, str) and not models and annotation is not Any:
            continue  # a choice of a union of plain types
        names.append(str(part))
        parent = models[0] if models else None
        field = parent.model_fields.get(str(part)) if parent and isinstance(part, str) else None
        if field:
            annotation = field.rebuild_annotation()
        elif not isinstance(part, int) and annotation is not Any:
            annotation = None  # no field of ours
    own_fields: frozenset[str] | None = None
    if family_of(annotation):
        own_fields = frozenset({"kind"})
    for model in _models(annotation):
        if "kind" in model.model_fields:
            own_fields = frozenset(model.model_fields)
    return _Field(".".join(map(brief, names)), parent, own_fields)


def _member(annotation: object, tag: int | str) -> type[BaseModel] | None:
    """The spec that a tag chooses, where an annotation is a union by kind; None: it is none, or has no such tag."""
    family = family_of(annotation)
    if family is not None:
        return family.load(str(tag)) if tag in family.names else None
    models = list(_models(annotation))
    if len(models) > 1:
        for model in models:
            if tag in get_args(model.model_fields["kind"].annotation):
                return model
    return None


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """The spec types that an annotation names, without the members of a `SpecFamily`."""
    if isinstance(annotation, LazySpec):
        yield annotation.load()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple, list):
        for part in get_args(annotation):
            yield from _models(part)
