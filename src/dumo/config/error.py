"""Pydantic's errors as lines to act on: the dotted path, what is wrong, the nearest valid name.

`dumo.config.load` calls `explain`, which writes a line for each mistake. To name the field, what it may hold and the
names that are valid there, `_locate` follows pydantic's location from the root spec down to the field. The words of
most lines are those of `dumo.config.line`.
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
_MISSING_HINTS = {  # by dotted path: what belongs into a field that has no default
    "data.root": ": where the images are, or the folder of latents that dumo encode writes",
    "pipeline.source": ": a folder of diffusers, or a published name (docs/pretrained.md)",
    "net.texts.root": ": the folder that dumo encode writes the table of captions into, e.g. runs/texts/mine",
    "teacher.source": ": the folder of a run that has a velocity",
}


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Pydantic's error as lines, one per mistake; `root` is the spec that was validated."""
    mistakes = error.errors(include_url=False)
    # where something inside is wrong, too: there, pydantic calls a list too short, for it counts no wrong items
    outer_locations = {mistake["loc"][:-1] for mistake in mistakes}
    lines: list[str] = []
    for mistake in mistakes:
        if mistake["type"] != "too_short" or mistake["loc"] not in outer_locations:
            lines.append(_explain_one(mistake, root))
    return lines


@dataclass(frozen=True)
class _Field:
    """The field that a mistake is about."""

    path: str  # dotted, without pydantic's tags
    parent: type[BaseModel] | None  # the spec in which the path's last name was sought; None: it is not known
    # The fields of the part that belongs there: of a spec with a `kind`. {"kind"}: any spec of a family; None: no part
    part_fields: frozenset[str] | None


def _explain_one(mistake: ErrorDetails, root: type[BaseModel]) -> str:
    """The line for one of pydantic's mistakes."""
    field = _locate(mistake["loc"], root)
    path = field.path
    value = mistake["input"]
    context = mistake.get("ctx", {})  # the values that pydantic puts into its message
    match mistake["type"]:
        case "extra_forbidden":
            valid_names = field.parent.model_fields if field.parent else ()
            return line.unknown_key(path, str(mistake["loc"][-1]), valid_names)
        case "union_tag_invalid":
            kinds = context["expected_tags"].replace("'", "").split(", ")  # of "'dit', 'unet'"
            return line.unknown_kind(path, context["tag"], kinds)
        case "union_tag_not_found":
            if value is None or isinstance(value, dict):
                return f"{path}.kind: missing; say which kind this is"
            return line.no_mapping(path, value)
        case "missing":
            return f"{path}: missing{_MISSING_HINTS.get(path, '')}"
        case "value_error":
            message = str(context["error"])
            has_path = not path or message.startswith(f"{path} ")
            return message if has_path else f"{path}: {message}"
        case _:
            return line.wrong_value(path, mistake, fields=field.part_fields)


def _locate(loc: Location, root: type[BaseModel]) -> _Field:
    """The field at pydantic's location.

    Besides names of fields and numbers of a list's items, a location has tags: the choices of unions. ("net", "dit",
    "width") is the field net.width, with the tag "dit"; ("data", TAG, "folder") is data.folder, of a class from
    outside.
    """
    names: list[str] = []
    parent: type[BaseModel] | None = None
    # What may stand at the location so far. Any: the inside of a class from outside, where each part is a name. None:
    # below a field that there is none of, or that holds a plain value
    annotation: Any = root
    for part in loc:
        if part == TAG:
            annotation = Any
            continue
        member = _member(annotation, part)
        if member is not None:  # the tag of a spec
            annotation = member
            continue
        spec = next(_models(annotation), None)
        if isinstance(part, str) and spec is None and annotation is not Any:  # the tag of a plain type
            continue
        names.append(str(part))
        parent = spec
        annotation = _inner_annotation(annotation, part)
    return _Field(".".join(map(brief, names)), parent, _part_fields(annotation))


def _inner_annotation(annotation: object, part: int | str) -> Any:  # noqa: ANN401
    """The annotation of a field of this name, or of a list's item; None: there is no such field."""
    if isinstance(part, int) or annotation is Any:
        return annotation  # a list's is its items', too: `_models` looks inside
    spec = next(_models(annotation), None)
    field = spec.model_fields.get(part) if spec is not None else None
    return None if field is None else field.rebuild_annotation()


def _part_fields(annotation: object) -> frozenset[str] | None:
    """The fields of the part that an annotation describes, as `_Field.part_fields` has them."""
    fields: frozenset[str] | None = None
    if family_of(annotation) is not None:
        fields = frozenset({"kind"})
    for spec in _models(annotation):
        if "kind" in spec.model_fields:
            fields = frozenset(spec.model_fields)
    return fields


def _member(annotation: object, tag: int | str) -> type[BaseModel] | None:
    """The spec that a tag chooses, where an annotation is a union by kind; None: it is no union, or has no such tag."""
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
