"""Say pydantic's errors as lines to act on: the dotted path, what is wrong, the nearest valid name.

`explain` writes a line for each error; `_locate` follows pydantic's location through the specs, so that a line can name
the field, what it may hold, and the names that are valid there. `require_known`, `nearest` and `nearest_few` say the
valid names for any choice, in all of dumo.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dumo.io.read import brief
from dumo.types import UserError
from dumo.types.family import family_of
from dumo.types.outside import TAG

Location = tuple[int | str, ...]
MISSING = {  # by dotted path: what belongs into a field that has no default
    "data.root": ": where the images are, or the folder of latents that dumo encode writes",
    "pipeline.source": ": a folder of diffusers, or a published name (docs/pretrained.md)",
    "net.texts.root": ": the folder that dumo encode writes the table of captions into, e.g. runs/texts/mine",
    "teacher.source": ": the folder of a run that has a velocity",
}
REMOVED = {  # by dotted path: what to write instead of a field of older runs
    "net.source": "pipeline names the folder now, of the model, its autoencoder, texts and scheduler: pipeline=DIR",
    "net.config": "pipeline has the hashes of its parts now: remove it",
}
MAX_ERROR_LINES = 20  # ours
# What pydantic says of JSON, in YAML's words.
PLAIN_WORDS = {"a valid array": "a list", "an object": "a mapping of names to values"}


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Pydantic's error as lines, one per mistake, up to MAX_ERROR_LINES; `root` is the spec that was validated."""
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
    """A hint: the one of the valid names that is nearest, or all of them where none is near."""
    near_names = get_close_matches(brief(name), names, n=1)
    return f"did you mean '{near_names[0]}'?" if near_names else f"valid: {', '.join(names)}"


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError where `name` is not known, with the nearest known name. `what` is a noun: "recipe"."""
    names = [*known]
    if name not in names:
        raise UserError(f"there is no {what} '{name}'; {nearest(name, names)}")


def nearest_few(name: str, names: list[str]) -> str:
    """A hint of up to three near names, for where all names would be too many; "" if none is near."""
    quoted = [f"'{near_name}'" for near_name in get_close_matches(brief(name), names, n=3, cutoff=0.5)]
    if not quoted:
        return ""
    if len(quoted) == 1:
        return f"did you mean {quoted[0]}? "
    return f"did you mean {', '.join(quoted[:-1])} or {quoted[-1]}? "


@dataclass(frozen=True)
class _Field:
    """The field that an error is about."""

    path: str  # dotted, without pydantic's tags
    parent: type[BaseModel] | None  # the model whose field the last name of the path is, or is not
    has_kind: bool  # whether its value may be a spec with a `kind`


def _line(error: ErrorDetails, root: type[BaseModel]) -> str:
    """The line for one of pydantic's errors."""
    field = _locate(error["loc"], root)
    path = field.path
    value = error["input"]
    match error["type"]:
        case "extra_forbidden":
            if path in REMOVED:
                return f"{path}: {REMOVED[path]}"
            from dumo.config.foreign import ours

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
            names_field = message.startswith(f"{path} ")
            return message if not path or names_field else f"{path}: {message}"
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
    has_kind = bool(family_of(annotation)) or any("kind" in model.model_fields for model in _models(annotation))
    return _Field(".".join(map(brief, names)), parent, has_kind)


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
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple, list):
        for part in get_args(annotation):
            yield from _models(part)
