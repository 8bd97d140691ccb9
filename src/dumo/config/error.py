"""Pydantic's errors as lines to act on: the dotted path, what is wrong, the nearest valid name."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dumo.config.foreign import ours
from dumo.io.read import brief
from dumo.types import UserError
from dumo.types.outside import TAG

Location = tuple[int | str, ...]
WAYS = {  # out of fields that have no default
    "data.root": ": where the images are, or the folder of latents that dumo encode writes",
    "pipeline.source": ": a folder of diffusers, or a published name (docs/pretrained.md)",
    "net.texts.root": ": the folder that dumo encode writes the table of captions into, e.g. runs/texts/mine",
    "teacher.source": ": the folder of a run that has a velocity",
}
GONE = {  # fields of older runs
    "net.source": "pipeline names the folder now, of the model, its autoencoder, texts and scheduler: pipeline=DIR",
    "net.config": "pipeline has the hashes of its parts now: remove it",
}
MOST = 20  # lines that are shown: ours
JSON = {"a valid array": "a list", "an object": "a mapping of names to values"}  # what pydantic says, and YAML's words


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line per mistake, up to MOST."""
    errors = error.errors(include_url=False)
    parts = {one["loc"][:-1] for one in errors}  # pydantic calls a list too short whose parts are wrong
    found = [_line(one, root) for one in errors if one["type"] != "too_short" or one["loc"] not in parts]
    more = [f"and {len(found) - MOST:,} more mistakes"] if len(found) > MOST else []
    return "\n".join([*found[:MOST], *more])


def nearest(name: str, names: list[str]) -> str:
    """A hint: the nearest of the valid names, or all of them."""
    close = get_close_matches(brief(name), names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError, with the nearest valid name, where there is no thing of this name."""
    if name not in (names := [*known]):
        raise UserError(f"there is no {what} '{name}'; {nearest(name, names)}")


def nearest_few(name: str, names: list[str]) -> str:
    """A hint of up to three near names, where all would be too many; empty if none is near."""
    close = [f"'{near}'" for near in get_close_matches(brief(name), names, n=3, cutoff=0.5)]
    if not close:
        return ""
    *others, last = close
    return f"did you mean {', '.join(others)}{' or ' if others else ''}{last}? "


def _line(found: ErrorDetails, root: type[BaseModel]) -> str:
    loc, ctx = found["loc"], found.get("ctx", {})
    path, model, there = _walk(loc, root)
    match found["type"]:
        case "extra_forbidden":
            known = sorted(model.model_fields) if model else []
            if path in GONE:
                return f"{path}: {GONE[path]}"
            return f"{path}: unknown key; {ours(str(loc[-1])) or nearest(str(loc[-1]), known)}"
        case "union_tag_invalid":
            tags = ctx["expected_tags"].replace("'", "").split(", ")
            return f"{path}.kind: there is no '{brief(ctx['tag'])}'; {nearest(ctx['tag'], tags)}"
        case "union_tag_not_found":
            bare = found["input"]
            if (bare := found["input"]) is None or isinstance(bare, dict):
                return f"{path}.kind: missing; say which kind this is"
            way = f"; write {path}.kind={brief(bare)}" if isinstance(bare, str) else ""
            return f"{path}: input should be a mapping of names to values; got {brief(repr(bare))}{way}"
        case "missing":
            return f"{path}: missing{WAYS.get(path, '')}"
        case "value_error":
            text = str(ctx["error"])
            return text if not path or text.startswith(f"{path} ") else f"{path}: {text}"
        case _:
            message, given = found["msg"][0].lower() + found["msg"][1:], found["input"]
            for json, plain in JSON.items():
                message = message.replace(json, plain)
            whole = isinstance(given, float) and found["type"] == "int_type" and given.is_integer()
            way = f"; write {given:.0f}" if whole else ""
            if isinstance(given, str) and any("kind" in one.model_fields for one in there):
                way = f"; write {path}.kind={brief(given)}"
            return f"{path}: {message}; got {brief(repr(given))}{way}"


def _walk(loc: Location, root: type[BaseModel]) -> tuple[str, type[BaseModel] | None, list[type[BaseModel]]]:
    """The dotted path without pydantic's tags, the model that lacks or rejects the last key, what may stand there."""
    names: list[str] = []
    annotation: Any = root
    model: type[BaseModel] | None = None
    for part in loc:
        if part == TAG:  # a class from outside: what follows is its own
            annotation = Any
            continue
        models = list(_models(annotation))
        tagged = [m for m in models if part in get_args(m.model_fields["kind"].annotation)] if len(models) > 1 else []
        if tagged:
            annotation = tagged[0]
            continue
        if isinstance(part, str) and not models and annotation is not Any:
            continue  # a choice of a union of plain types
        names.append(str(part))
        model = models[0] if models else None
        field = model.model_fields.get(str(part)) if model and isinstance(part, str) else None
        annotation = field.annotation if field else annotation if isinstance(part, int) or annotation is Any else None
    return ".".join(map(brief, names)), model, [*_models(annotation)]


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """The spec types that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple, list):
        for part in get_args(annotation):
            yield from _models(part)
