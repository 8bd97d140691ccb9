"""Load a run from a recipe's name, a file or a folder, with `a.b=c` overrides; and write it as YAML.

`load` is the entrance. In this order it reads the text (`dumo.config.source`), sets the overrides, fills in what was
found when the run was first opened (`resolved`), and validates the tree (`parse`). `load_recipe` reads a shipped recipe
by name, `run_of` a text that is read already.

`dump` is the inverse of `load`, and `summary` a shorter tree for people. `differences` compares two runs. `Written` is
a run with the changes that were made to it while it trained, and `identity` a hash of what may not change.
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
from dumo.config.source import RUN_FILE as RUN_FILE
from dumo.config.spec import Run
from dumo.io import digest
from dumo.io.yaml import dump_yaml
from dumo.types import Spec, UserError

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Difference:
    """A field in which two runs differ. Its values are JSON values."""

    field: str  # its dotted path
    was: object
    now: object
    may: bool  # whether the field may change when a run is resumed

    def __str__(self) -> str:
        return self.between("there", "asked")

    def between(self, there: str, here: str) -> str:
        """A line: the field, and both values, each followed by a word for whose it is."""
        return f"{self.field}: {shown(self.was)} {there}, {shown(self.now)} {here}"


def load(source: str | Path | RunText, overrides: Sequence[str] = ()) -> Run:
    """Read a run: a recipe's name, a YAML file, or a folder with a run.yaml; a Path is no recipe if it is there.

    A text that was read of one is not read again. Raises UserError, one line per mistake, each with its dotted path and
    the nearest valid name.
    """
    trust.accept(overrides)
    text = source if isinstance(source, RunText) else read(source)
    return run_of(text, overrides)


def run_of(text: RunText, overrides: Sequence[str] = ()) -> Run:
    """The run that a text describes, with `overrides` set. Raises as `load`."""
    tree = deepcopy(text.tree)
    override(tree, overrides)
    resolved = tree.get(RESOLVED)
    if isinstance(resolved, dict):  # anything else is left to validation
        _fill(tree, resolved)
    return parse(Run, tree, text.name)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Run:
    """Read the shipped recipe of this name, also where a file or folder here has the name. Raises as `load`."""
    return load(f"{SHIPPED_PREFIX}{name}", overrides)


def parse(spec: type[S], tree: object, name: str = "") -> S:
    """Validate a tree of plain values as a spec. Types are as strict as in JSON: "2" is no number, 2.0 no integer.

    Raises UserError, one line per mistake, each after `name` if that is a file's; and, before any code is imported, for
    code that the tree names and nobody agrees to run (`dumo.config.trust`).
    """
    trust.require(trust.named_classes(tree), name)
    try:
        return spec.model_validate_json(to_json(tree, inf_nan_mode="constants"), strict=True)
    except PydanticSerializationError as error:  # the name of a field: YAML refuses such values
        raise UserError(f"a field's name has half a character, which is no text: {error}") from error
    except ValidationError as error:
        from dumo.config.error import explain
        from dumo.config.line import lines_of

        raise UserError(lines_of(explain(error, spec), name)) from error


def _fill(tree: dict[str, Any], resolved: dict[str, Any]) -> None:
    """Set, in place, the fields of a tree that are missing or null to what was found when the run was first opened.

    `resolved` has these values by dotted path.
    """
    for field, value in resolved.items():
        if field in (CODE, GIVEN, PROPOSED):  # records of the run, no fields
            continue
        *parents, name = str(field).split(".")
        part = _part_at(tree, parents)
        if part is not None and part.get(name) is None:
            part[name] = value


def _part_at(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    """The mapping at a path of names in a tree; None: there is none."""
    part: Any = tree
    for name in path:
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else None


def dump(run: Run, changed: Sequence[Noted] = (), *, short: bool = False) -> str:
    """The complete run as YAML, which `load` reads back: its format, `changed`, the fields, and `resolved`.

    `short` writes its `summary` instead, without `resolved`.
    """
    written: dict[str, Any] = {KEY: FORMAT}
    if changed:
        written[CHANGED] = [change.model_dump(mode="json", exclude_defaults=True) for change in changed]
    tree = summary(run) if short else run.model_dump(mode="json")
    resolved = tree.pop(RESOLVED, {})
    for field in resolved:  # written under `resolved` alone
        *parents, name = field.split(".")
        part = _part_at(tree, parents)
        if part is not None:
            part.pop(name, None)
    written |= tree
    if resolved and not short:
        written[RESOLVED] = resolved
    return dump_yaml(written)


def summary(part: BaseModel) -> dict[str, Any]:
    """A spec as plain values, for people: without fields at a default that is null, empty or marked quiet.

    `parse` reads it back as the same spec.
    """
    tree = part.model_dump(mode="json")
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if value == _default_of(field) and (_marks_of(field).get("quiet") or value in (None, "", (), {})):
            tree.pop(name, None)
        elif name in tree and isinstance(value, BaseModel):
            tree[name] = summary(value)
        elif name in tree and isinstance(value, tuple):
            for i, item in enumerate(cast(tuple[object, ...], value)):
                if isinstance(item, BaseModel):
                    tree[name][i] = summary(item)
    return tree


def _marks_of(field: FieldInfo) -> Mapping[str, Any]:
    """The marks of a field (`dumo.types`): quiet, free, changes, pinned, where."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _default_of(field: FieldInfo) -> object:
    """A field's default; pydantic's PydanticUndefined where it has none."""
    return field.get_default(call_default_factory=True)


def difference(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    """`differences` as lines: one for each field that differs and is not free to change."""
    return map(str, differences(old, new, prefix))


def differences(old: BaseModel, new: BaseModel, prefix: str = "", *, may: bool = False) -> Iterator[Difference]:
    """The fields of two specs that differ and are not free to change.

    Parts of one class are compared field by field, others whole. `prefix` stands before each path; `may`: the fields
    are those of a part that may change.
    """
    for name, field in type(old).model_fields.items():
        marks = _marks_of(field)
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
    """A run as its run.yaml has it, with the changes that were made to it while it trained."""

    run: Run
    past: Sequence[Noted]  # the changes, in order

    @classmethod
    def of(cls, text: RunText) -> "Written":
        """The run that a text describes, and the changes that the text lists. Raises as `load`."""
        return cls(run_of(text), text.changed)

    def changes(self, now: Run, step: int) -> list[Noted]:
        """The changes that run.yaml has to list if the run goes on after `step` as `now`.

        Changes after `step` are listed at `step`, since later steps are trained anew. [] where no step is trained yet.
        """
        if step == 0:
            return []
        earlier = [change for change in self.past if change.step < step]
        changes_from_here = [change for change in self.past if change.step >= step]
        for diff in differences(self.run, now):
            change = Noted(step=step, field=diff.field, was=diff.was, now=diff.now, accepted=not diff.may)
            changes_from_here.append(change)

        # one change for each field, from what it was at first to what it is now
        change_by_field: dict[str, Noted] = {}
        for change in changes_from_here:
            first = change_by_field.get(change.field, change)
            change_by_field[change.field] = change.model_copy(update={"step": step, "was": first.was})
        merged = [change for change in change_by_field.values() if change.was != change.now]
        return [*earlier, *merged]

    def replayed(self, changes: Sequence[Noted], *, back: bool = False) -> Run:
        """The run with these changes applied in order; with `back`, with them undone from the last to the first."""
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
        """The `identity` of the run as it is now, and as it was before each change that --accept allowed."""
        identities = {identity(self.run)}
        for step in {change.step for change in self.past if change.accepted}:
            changes_since = [change for change in self.past if change.step >= step]
            identities.add(identity(self.replayed(changes_since, back=True)))
        return identities


def identity(spec: BaseModel) -> str:
    """A hash of the fields that may not change while a run trains. A snapshot's metadata say by it whose it is.

    Fields at their defaults do not count, so that a field that a later dumo adds leaves the hash as it is.
    """
    return digest.of_bytes(json.dumps(_fixed(spec), sort_keys=True).encode())


def _fixed(part: BaseModel) -> dict[str, Any]:
    """The fields of a spec that may not change and are not at their defaults, as plain values."""
    tree: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        may_change = bool(_marks_of(field).keys() & {"free", "changes", "where"})
        if may_change or value == _default_of(field):
            continue
        if isinstance(value, BaseModel):
            tree[name] = _fixed(value)
        else:
            tree[name] = to_jsonable_python(value)
    return tree
