"""Format each pydantic error in one line: the dotted path of the field, the mistake, and the nearest valid name.

`explain` writes the lines for `dumo.config.load.parse`. The words are pydantic's own except for unknown keys and
kinds, where the nearest valid name is added.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dumo.config.overrides import SHORT_FORMS
from dumo.config.spec import Run
from dumo.config.suggestion import nearest
from dumo.io.read import brief
from dumo.types.outside import BUNDLED, OUTSIDE, members

Location = tuple[int | str, ...]


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Format a pydantic error as lines, one per mistake; `root` is the validated spec."""
    return [_explain_one(mistake, root) for mistake in error.errors(include_url=False)]


def _explain_one(mistake: ErrorDetails, root: type[BaseModel]) -> str:
    """Return the line for one of pydantic's mistakes."""
    path, parent = _locate(mistake["loc"], root)
    context = mistake.get("ctx", {})
    value = brief(repr(mistake["input"]))
    match mistake["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key; {_hint(mistake, path, parent, root)}"
        case "union_tag_invalid":
            kinds = context["expected_tags"].replace("'", "").split(", ")
            return f"{path}.kind: unknown kind '{brief(context['tag'])}'; {nearest(context['tag'], kinds)}"
        case "union_tag_not_found":
            return f"{path}: Input should be a mapping with a kind; got {value}"
        case "missing":
            return f"{path}: field required"
        case "value_error":
            message = str(context["error"])
            has_path = not path or message.startswith(f"{path} ")
            return message if has_path else f"{path}: {message}"
        case _:
            return f"{path}: {mistake['msg']}; got {value}"


def _hint(mistake: ErrorDetails, path: str, parent: type[BaseModel] | None, root: type[BaseModel]) -> str:
    """Return a hint for an unknown key at `path`: the nearest field, or the valid names."""
    # Include a field of an unknown part in the search: training.steps is near train.steps.
    typed = path
    inner = mistake["input"]
    while isinstance(inner, dict) and len(inner) == 1:
        [(inner_name, inner)] = inner.items()
        typed = f"{typed}.{inner_name}"
    part, _, name = path.rpartition(".")
    own_names = sorted(parent.model_fields) if parent else []
    if part:
        # In an existing part, suggest a field of the same name elsewhere, or a similar field of this part.
        fields = [*field_paths(root)]
        is_of_another_kind = typed in fields
        meant = None if is_of_another_kind else _field_of_same_name(typed, fields)
        matches = [meant] if meant else [f"{part}.{match}" for match in get_close_matches(name, own_names, n=2)]
    else:
        meant = nearest_field(typed, root)
        matches = [meant] if meant else []
    if matches:
        return f"did you mean {' or '.join(map(repr, matches))}?"
    if root is Run and not part:
        return f"`dumo show digits --all` lists all; short forms are {', '.join(SHORT_FORMS)}"
    return f"valid: {', '.join(own_names)}"


def nearest_field(typed: str, root: type[BaseModel] = Run) -> str | None:
    """Return the field of a spec, at any depth, that is nearest to the typed dotted path, or None.

    Fields of the same name are preferred, such as train.optimizer.lr for optimizer.lr.
    """
    fields = [*field_paths(root)]
    same_name = _field_of_same_name(typed, fields)
    if same_name:
        return same_name
    part, _, name = typed.rpartition(".")
    if part:
        # A common prefix is not enough: trainer.max_iter is not train.max_skips.
        fields = [field for field in fields if get_close_matches(name, [field.rpartition(".")[2]])]
    short_forms = SHORT_FORMS if root is Run else {}
    near_names = get_close_matches(typed, [*fields, *short_forms], n=1)
    return short_forms.get(near_names[0], near_names[0]) if near_names else None


def _field_of_same_name(typed: str, fields: Sequence[str]) -> str | None:
    """Return the nearest field with the same last name as a dotted path, or None."""
    name = typed.rpartition(".")[2]
    same_name = [field for field in fields if field.rpartition(".")[2] == name]
    return get_close_matches(typed, same_name, n=1, cutoff=0)[0] if same_name else None


def field_paths(spec: type[BaseModel], parents: tuple[type[BaseModel], ...] = ()) -> Iterator[str]:
    """Yield the dotted paths of all fields of a spec, at any depth and for every kind; lists are represented by item 0.

    Recursive specs are not followed.
    """
    for name, field in spec.model_fields.items():
        yield name
        item = f"{name}.0" if get_origin(field.annotation) is tuple else name
        for part in members(field.rebuild_annotation()):
            if part is not spec and part not in parents:
                for path in field_paths(part, (*parents, spec)):
                    yield f"{item}.{path}"


def _locate(loc: Location, root: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """Return the dotted path of pydantic's location, and the spec in which its last name was looked up, if it is known.

    Besides names of fields and numbers of a list's items, a location has the tags of unions, which the path leaves
    out: ("net", BUNDLED, "dit", "width") is the field net.width, and ("data", OUTSIDE, "folder") is data.folder of a
    class from outside.
    """
    names: list[str] = []
    parent: type[BaseModel] | None = None
    # What may stand at the location so far. It is Any inside a class from outside, whose fields are not known here,
    # and None below a field that holds a plain value.
    annotation: Any = root
    for part in loc:
        if part == BUNDLED:
            continue
        if part == OUTSIDE:
            annotation = Any
            continue
        chosen = _spec_of_kind(annotation, part)
        if chosen is not None:
            annotation = chosen
            continue
        spec = next(iter(members(annotation)), None)
        is_tag_of_plain_type = isinstance(part, str) and spec is None and annotation is not Any
        if is_tag_of_plain_type:
            continue
        names.append(brief(str(part)))
        parent = spec
        # An item of a list keeps the list's annotation, because `members` looks inside it.
        if isinstance(part, str) and annotation is not Any:
            field = spec.model_fields.get(part) if spec is not None else None
            annotation = None if field is None else field.rebuild_annotation()
    return ".".join(names), parent


def _spec_of_kind(annotation: object, kind: int | str) -> type[BaseModel] | None:
    """Return the spec of this kind where an annotation is a union by kind that has it, else None."""
    specs = members(annotation)
    if len(specs) > 1:
        for spec in specs:
            if kind in get_args(spec.model_fields["kind"].annotation):
                return spec
    return None
