"""Load a run from a recipe's name, a file or a folder, with `a.b=c` overrides; and write it as YAML.

`load` reads the text (`dumo.config.source`), sets the overrides, fills in what was found when the run was opened, and
validates (`parse`). `dump` is its inverse. `differences` compares two runs, `Written` a run with its own past.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
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
        prefix = f"{name}: " if Path(name).suffix else ""
        raise UserError("\n".join(prefix + line for line in explain(error, spec).splitlines())) from error


def fill(tree: dict[str, Any], resolved: object) -> None:
    """Put what was found when a run was opened into its fields, but where one is given. The tree is changed."""
    if not isinstance(resolved, dict):
        return
    for field, value in resolved.items():
        if field in (CODE, GIVEN, PROPOSED):  # records, of no field
            continue
        *parents, name = str(field).split(".")
        part = part_at(tree, parents)
        if part is not None and part.get(name) is None:
            part[name] = value


def part_at(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    """The mapping at a path of names; None: there is none."""
    part: Any = tree
    for name in path:
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else None


def dump(run: Run, changed: Sequence[Noted] = (), *, short: bool = False) -> str:
    """The complete run as YAML, or `short`ly its summary; its format first, then changes. `load` reads it back."""
    written: dict[str, Any] = {KEY: FORMAT}
    if changed:
        written[CHANGED] = [change.model_dump(mode="json", exclude_defaults=True) for change in changed]
    tree = summary(run) if short else run.model_dump(mode="json")
    resolved = tree.pop(RESOLVED, {})
    for field in resolved:  # they are written once, below
        *parents, name = field.split(".")
        part = part_at(tree, parents)
        if part is not None:
            part.pop(name, None)
    written |= tree
    if resolved and not short:
        written[RESOLVED] = resolved
    return yaml.dump(written)


def summary(part: BaseModel) -> dict[str, Any]:
    """A spec as plain values, for people: without defaults that are marked quiet, null or empty.

    `parse` reads it back as the same spec.
    """
    tree = part.model_dump(mode="json")
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if value == default_of(field) and (marks_of(field).get("quiet") or value in (None, "", (), {})):
            tree.pop(name, None)
        elif name in tree and isinstance(value, BaseModel):
            tree[name] = summary(value)
        elif name in tree and isinstance(value, tuple):
            for place, item in enumerate(cast(tuple[object, ...], value)):
                if isinstance(item, BaseModel):
                    tree[name][place] = summary(item)
    return tree


def marks_of(field: FieldInfo) -> Mapping[str, Any]:
    """What a field is marked as, for its run: quiet, free, changes, pinned, where (`dumo.types`)."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def default_of(field: FieldInfo) -> object:
    """A field's default; pydantic's PydanticUndefined where it has none."""
    return field.get_default(call_default_factory=True)


def difference(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    """A line per field that differs and is not free to change."""
    return map(str, differences(old, new, prefix))


def differences(old: BaseModel, new: BaseModel, prefix: str = "", *, may: bool = False) -> Iterator[Difference]:
    """The fields that differ and are not free, field by field in parts of the same kind."""
    for name, field in type(old).model_fields.items():
        marks = marks_of(field)
        was = getattr(old, name)
        now = getattr(new, name)
        if marks.get("free") or (marks.get("pinned") and was is None):
            continue
        may_change = may or bool(marks.get("changes"))
        if isinstance(was, BaseModel) and type(was) is type(now):
            yield from differences(was, now, f"{prefix}{name}.", may=may_change)
        elif was != now:
            yield Difference(f"{prefix}{name}", to_jsonable_python(was), to_jsonable_python(now), may_change)


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
        earlier = [change for change in self.past if change.step < step]
        later = [change for change in self.past if change.step >= step]
        for new in differences(self.run, now):
            later.append(Noted(step=step, field=new.field, was=new.was, now=new.now, accepted=not new.may))

        # one change for each field, from what it was at first to what it is now
        change_by_field: dict[str, Noted] = {}
        for change in later:
            first = change_by_field.get(change.field, change)
            change_by_field[change.field] = change.model_copy(update={"step": step, "was": first.was})
        return [*earlier, *(change for change in change_by_field.values() if change.was != change.now)]

    def replayed(self, changes: Sequence[Noted], *, back: bool = False) -> Run:
        """The run after these changes, in order; `back`: before them."""
        if not changes:
            return self.run
        tree = self.run.model_dump(mode="json")
        for change in reversed(changes) if back else changes:
            if change.of_data:
                continue
            value = change.was if back else change.now
            override(tree, [f"{change.field}={shown(value)}"])
        return parse(Run, tree)

    def identities(self) -> set[str]:
        """The `identity` of the run, now and before each change that was accepted."""
        identities = {identity(self.run)}
        for step in {change.step for change in self.past if change.accepted}:
            changes_since = [change for change in self.past if change.step >= step]
            identities.add(identity(self.replayed(changes_since, back=True)))
        return identities


def identity(spec: BaseModel) -> str:
    """A hash of what no run may change while it trains: of a snapshot's metadata, to know whose it is.

    Fields at their defaults do not count, so that fields to come leave it as it is.
    """
    return digest.of_bytes(json.dumps(_fixed(spec), sort_keys=True).encode())


def _fixed(part: BaseModel) -> dict[str, Any]:
    """The fields of a spec that are neither free, nor may change, nor are at their defaults."""
    tree = dict[str, Any]()
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if not marks_of(field).keys() & {"free", "changes", "where"} and value != default_of(field):
            tree[name] = _fixed(value) if isinstance(value, BaseModel) else to_jsonable_python(value)
    return tree
