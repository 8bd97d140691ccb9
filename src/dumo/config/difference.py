"""Which fields of two specs differ, and a hash of the fields that may not change.

- `differences` yields a `Difference` for each field, and `difference_lines` a line of text. Both leave out free fields,
  and hashes that an older dumo did not take (marks of `dumo.types`).
- `identity` is the hash. It leaves out fields at their defaults, and all that may change: free fields, those whose
  changes run.yaml lists, and paths.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from dumo.config.change import yaml_text
from dumo.io import digest
from dumo.types import marks_of

_MARKS_LEFT_OUT_OF_IDENTITY = {"free", "changes", "where"}


@dataclass(frozen=True)
class Difference:
    """A field in which two runs differ. Its values are JSON values."""

    field: str  # its dotted path
    was: object
    now: object
    may_change: bool  # whether a resumed run may have another value

    def __str__(self) -> str:
        """A line: the field, its value in the run's folder, and the one that is asked for."""
        return self.between("there", "asked")

    def between(self, whose_was: str, whose_now: str) -> str:
        """A line: the field, and both values, each followed by words for whose it is."""
        return f"{self.field}: {yaml_text(self.was)} {whose_was}, {yaml_text(self.now)} {whose_now}"


def differences(
    old: BaseModel, new: BaseModel, prefix: str = "", *, is_inside_changeable: bool = False
) -> Iterator[Difference]:
    """The fields of two specs of one class that differ and are not free to change.

    Parts that are specs of one class are compared field by field, other values whole. `prefix` stands before each path.
    `is_inside_changeable` says that the specs are parts of a field that may change, so all their fields may.
    """
    for name, field in type(old).model_fields.items():
        marks = marks_of(field)
        was = getattr(old, name)
        now = getattr(new, name)
        if marks.get("free"):
            continue
        if marks.get("pinned") and was is None:  # an older dumo took no hash
            continue
        may_change = is_inside_changeable or bool(marks.get("changes"))
        if isinstance(was, BaseModel) and type(was) is type(now):
            yield from differences(was, now, f"{prefix}{name}.", is_inside_changeable=may_change)
        elif was != now:
            yield Difference(f"{prefix}{name}", to_jsonable_python(was), to_jsonable_python(now), may_change)


def difference_lines(old: BaseModel, new: BaseModel) -> Iterator[str]:
    """A line of text for each of the `differences`."""
    return map(str, differences(old, new))


def identity(spec: BaseModel) -> str:
    """A hash of the fields that may not change while a run trains.

    Snapshots and files of weights store it, and are recognized as the run's by it. Fields at their defaults do not
    count: a field that a later dumo adds leaves the hash as it is.
    """
    return digest.of_bytes(json.dumps(_identity_fields(spec), sort_keys=True).encode())


def _identity_fields(part: BaseModel) -> dict[str, Any]:
    """The fields of a spec that may not change and are not at their defaults, as JSON values."""
    tree: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        is_default = value == field.get_default(call_default_factory=True)
        if is_default or marks_of(field).keys() & _MARKS_LEFT_OUT_OF_IDENTITY:
            continue
        if isinstance(value, BaseModel):
            tree[name] = _identity_fields(value)
        else:
            tree[name] = to_jsonable_python(value)
    return tree
