"""Load a run from a recipe's name, a file or a folder, with `a.b=c` overrides; and write it as YAML."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

from dumo.config import trust
from dumo.config.change import override, shown
from dumo.config.error import explain
from dumo.config.source import (
    CHANGED,
    CODE,
    FORMAT,
    GIVEN,
    KEY,
    PROPOSED,
    RESOLVED,
    SHIPPED_PREFIX,
    Noted,
    RunText,
    read,
)
from dumo.config.source import FILE as FILE
from dumo.config.spec import Run
from dumo.io import digest, yaml
from dumo.types import Spec, UserError

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Difference:
    """A field in which two runs differ."""

    field: str  # its dotted path
    was: object  # a JSON value
    now: object
    may: bool  # whether it may change when a run is resumed

    def __str__(self) -> str:
        return self.between("there", "asked")

    def between(self, there: str, here: str) -> str:
        """In words, with a name for each of the two."""
        return f"{self.field}: {shown(self.was)} {there}, {shown(self.now)} {here}"


def load(source: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run: a recipe's name, a YAML file, or a folder with a run.yaml; a Path is no recipe if it is there.

    Raises UserError, one line per mistake, each with its dotted path and the nearest valid name.
    """
    trust.accept(overrides)
    return run_of(read(source), overrides)


def run_of(text: RunText, overrides: Sequence[str] = ()) -> Run:
    """The run that a text says, with these fields changed. Raises as `load`."""
    tree = deepcopy(text.tree)
    override(tree, overrides)
    fill(tree, tree.get(RESOLVED))
    return parse(Run, tree, text.name)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Run:
    """Read the recipe of this name, whatever lies under it here. Raises as `load`."""
    return load(f"{SHIPPED_PREFIX}{name}", overrides)


def parse(spec: type[S], tree: object, name: str = "") -> S:
    """A tree of plain values as a spec. Raises UserError, one line per mistake, each after the name of a file.

    So it does where the tree names code that nobody agrees to run (`dumo.config.trust`), before that is imported.
    Values are strict as in JSON: neither true nor a text is a number, and 2.0 is no integer.
    """
    trust.require(trust.classes(tree), name)
    try:
        return spec.model_validate_json(to_json(tree, inf_nan_mode="constants"), strict=True)
    except PydanticSerializationError as error:  # the name of a field: YAML refuses such values
        raise UserError(f"a field's name has half a character, which is no text: {error}") from error
    except ValidationError as error:
        where = f"{name}: " if Path(name).suffix else ""
        raise UserError("\n".join(where + line for line in explain(error, spec).splitlines())) from error


def fill(tree: dict[str, Any], found: object) -> None:
    """Put what was found into the fields it was found for, but where a field is given. The tree is changed."""
    for field, value in found.items() if isinstance(found, dict) else ():
        if field in (CODE, GIVEN, PROPOSED):  # records, of no field
            continue
        part: Any = tree
        *above, last = str(field).split(".")
        for name in above:
            part = part.get(name) if isinstance(part, dict) else None
        if isinstance(part, dict) and part.get(last) is None:
            part[last] = value


def clear(tree: dict[str, Any], path: Sequence[str]) -> None:
    """Remove a field that is there. The tree is changed."""
    if len(path) > 1:
        clear(tree.get(path[0]) or {}, path[1:])
    else:
        tree.pop(path[0], None)


def dump(run: Run, changed: Sequence[Noted] = (), *, short: bool = False) -> str:
    """The complete run as YAML, or `short`ly its summary; its format first, then changes. `load` reads it back."""
    past = [one.model_dump(mode="json", exclude_defaults=True) for one in changed]
    head = {KEY: FORMAT} | ({CHANGED: past} if past else {})
    tree = summary(run) if short else run.model_dump(mode="json")
    found = tree.pop(RESOLVED, {})
    for field in found:
        clear(tree, field.split("."))
    return yaml.dump({**head, **tree, **({RESOLVED: found} if found and not short else {})})


def summary(part: BaseModel) -> dict[str, Any]:
    """A spec as plain values, for people: without defaults that are marked quiet, null or empty.

    `parse` reads it back as the same spec.
    """
    tree = part.model_dump(mode="json")
    for name, field in type(part).model_fields.items():
        value, default = getattr(part, name), field.get_default(call_default_factory=True)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if value == default and (extra.get("quiet") or value in (None, "", (), {})):
            tree.pop(name, None)
        elif name in tree and isinstance(value, BaseModel):
            tree[name] = summary(value)
        elif name in tree and isinstance(value, tuple):
            parts = zip(cast(tuple[object, ...], value), tree[name], strict=True)
            tree[name] = [summary(one) if isinstance(one, BaseModel) else plain for one, plain in parts]
    return tree


def difference(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    """A line per field that differs and is not free to change."""
    return map(str, differences(old, new, prefix))


def differences(old: BaseModel, new: BaseModel, prefix: str = "", *, may: bool = False) -> Iterator[Difference]:
    """The fields that differ and are not free, field by field in parts of the same kind."""
    for name, field in type(old).model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        before, after, here = getattr(old, name), getattr(new, name), may or bool(extra.get("changes"))
        if extra.get("free") or (extra.get("pinned") and before is None):
            continue
        if isinstance(before, BaseModel) and type(before) is type(after):
            yield from differences(before, after, f"{prefix}{name}.", may=here)
        elif before != after:
            yield Difference(f"{prefix}{name}", to_jsonable_python(before), to_jsonable_python(after), here)


@dataclass(frozen=True)
class Written:
    """A run as it was written down, with what had changed in it while it trained."""

    run: Run
    past: Sequence[Noted]

    @classmethod
    def of(cls, text: RunText) -> "Written":
        """As a text says. Raises as `load`."""
        return cls(run_of(text), text.changed)

    def changes(self, now: Run, step: int) -> list[Noted]:
        """The changes to note in a run.yaml, if it goes on after `step` as `now`.

        Changes of later steps are noted at this one, since those steps are made anew. Before the first step there are
        none.
        """
        if step == 0:
            return []
        found, new = dict[str, Noted](), differences(self.run, now)
        again = [one for one in self.past if one.step >= step]
        again += [Noted(step=step, field=d.field, was=d.was, now=d.now, accepted=not d.may) for d in new]
        for one in again:
            first = found.get(one.field, one)
            found[one.field] = one.model_copy(update={"step": step, "was": first.was})
        return [*(one for one in self.past if one.step < step), *(one for one in found.values() if one.was != one.now)]

    def replayed(self, changes: Sequence[Noted], *, back: bool = False) -> Run:
        """The run after these changes, in order; `back`: before them."""
        tree = self.run.model_dump(mode="json")
        for one in reversed(changes) if back else changes:
            if not one.of_data:
                override(tree, [f"{one.field}={shown(one.was if back else one.now)}"])
        return parse(Run, tree) if changes else self.run

    def identities(self) -> set[str]:
        """The `identity` of the run, now and before each change that was accepted."""
        steps = {one.step for one in self.past if one.accepted}
        before = [self.replayed([one for one in self.past if one.step >= step], back=True) for step in steps]
        return {*map(identity, (self.run, *before))}


def identity(spec: BaseModel) -> str:
    """A hash of what no run may change while it trains: of a snapshot's metadata, to know whose it is.

    Fields at their defaults do not count, so that fields to come leave it as it is.
    """
    return digest.of_bytes(json.dumps(_fixed(spec), sort_keys=True).encode())


def _fixed(part: BaseModel) -> dict[str, Any]:
    """The fields of a spec that are neither free, nor may change, nor are at their defaults."""
    tree = dict[str, Any]()
    for name, field in type(part).model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value = getattr(part, name)
        if not extra.keys() & {"free", "changes", "where"} and value != field.get_default(call_default_factory=True):
            tree[name] = _fixed(value) if isinstance(value, BaseModel) else to_jsonable_python(value)
    return tree
