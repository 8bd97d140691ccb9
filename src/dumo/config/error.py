"""Say pydantic's errors as lines to act on: the dotted path, what is wrong, the nearest valid name.

`explain` writes a line for each error; `_locate` follows pydantic's location through the specs, so that a line can name
the field, what it may hold, and the names that are valid there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dumo.config.foreign import ours
from dumo.io.read import brief
from dumo.types import UserError
from dumo.types.family import family_of
from dumo.types.outside import TAG

Location = tuple[int | str, ...]
MISSING = {  # what belongs into a field that has no default
    "data.root": ": where the images are, or the folder of latents that dumo encode writes",
    "pipeline.source": ": a folder of diffusers, or a published name (docs/pretrained.md)",
    "net.texts.root": ": the folder that dumo encode writes the table of captions into, e.g. runs/texts/mine",
    "teacher.source": ": the folder of a run that has a velocity",
}
REMOVED = {  # fields of older runs
    "net.source": "pipeline names the folder now, of the model, its autoencoder, texts and scheduler: pipeline=DIR",
    "net.config": "pipeline has the hashes of its parts now: remove it",
}
MAX_ERROR_LINES = 20  # ours
# What pydantic says of JSON, in YAML's words.
PLAIN_WORDS = {"a valid array": "a list", "an object": "a mapping of names to values"}


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line per mistake, up to MAX_ERROR_LINES."""
    details = error.errors(include_url=False)
    parents = {detail["loc"][:-1] for detail in details}
    lines: list[str] = []
    for detail in details:
        # pydantic calls a list too short whose parts are wrong
        if detail["type"] != "too_short" or detail["loc"] not in parents:
            lines.append(_line(detail, root))
    if len(lines) > MAX_ERROR_LINES:
        lines = [*lines[:MAX_ERROR_LINES], f"and {len(lines) - MAX_ERROR_LINES:,} more mistakes"]
    return "\n".join(lines)


def nearest(name: str, names: list[str]) -> str:
    """A hint: the nearest of the valid names, or all of them."""
    close = get_close_matches(brief(name), names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError, with the nearest valid name, where there is no thing of this name."""
    names = [*known]
    if name not in names:
        raise UserError(f"there is no {what} '{name}'; {nearest(name, names)}")


def nearest_few(name: str, names: list[str]) -> str:
    """A hint of up to three near names, where all would be too many; empty if none is near."""
    close = [f"'{near}'" for near in get_close_matches(brief(name), names, n=3, cutoff=0.5)]
    if not close:
        return ""
    if len(close) == 1:
        return f"did you mean {close[0]}? "
    return f"did you mean {', '.join(close[:-1])} or {close[-1]}? "


@dataclass(frozen=True)
class _Field:
    """Where an error is."""

    path: str  # dotted, without pydantic's tags
    parent: type[BaseModel] | None  # the model that lacks or rejects the last name of the path
    has_kind: bool  # whether a spec with a `kind` may stand there


def _line(error: ErrorDetails, root: type[BaseModel]) -> str:
    """What to say of one error."""
    field = _locate(error["loc"], root)
    path = field.path
    value = error["input"]
    match error["type"]:
        case "extra_forbidden":
            if path in REMOVED:
                return f"{path}: {REMOVED[path]}"
            name = str(error["loc"][-1])
            valid = sorted(field.parent.model_fields) if field.parent else []
            return f"{path}: unknown key; {ours(name) or nearest(name, valid)}"
        case "union_tag_invalid":
            context = error.get("ctx", {})
            tags = context["expected_tags"].replace("'", "").split(", ")
            return f"{path}.kind: there is no '{brief(context['tag'])}'; {nearest(context['tag'], tags)}"
        case "union_tag_not_found":
            if value is None or isinstance(value, dict):
                return f"{path}.kind: missing; say which kind this is"
            message = f"{path}: input should be a mapping of names to values; got {brief(repr(value))}"
            return f"{message}; write {path}.kind={brief(value)}" if isinstance(value, str) else message
        case "missing":
            return f"{path}: missing{MISSING.get(path, '')}"
        case "value_error":
            message = str(error.get("ctx", {})["error"])
            return message if not path or message.startswith(f"{path} ") else f"{path}: {message}"
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            for json_word, plain_word in PLAIN_WORDS.items():
                message = message.replace(json_word, plain_word)
            message = f"{path}: {message}; got {brief(repr(value))}"
            if isinstance(value, str) and field.has_kind:
                message += f"; write {path}.kind={brief(value)}"
            elif isinstance(value, float) and error["type"] == "int_type" and value.is_integer():
                message += f"; write {value:.0f}"
            return message


def _locate(loc: Location, root: type[BaseModel]) -> _Field:
    """The field of a location, in which pydantic also names the tags of unions."""
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
    has_kind = bool(family_of(annotation)) or any("kind" in model.model_fields for model in _models(annotation))
    return _Field(".".join(map(brief, names)), parent, has_kind)


def _member(annotation: object, tag: int | str) -> type[BaseModel] | None:
    """The spec that this tag chooses, where an annotation is a union by kind."""
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
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple, list):
        for part in get_args(annotation):
            yield from _models(part)
