"""The fields in which two runs differ, and a hash of the fields that decide training.

A field decides training unless it is marked as free to change (FREE, CHANGES of `dumo.types`). A run resumes only with
the deciding fields that it began with: run.yaml and its checkpoints have the hash of these (`config_hash`), and
`differences` says in which fields two runs differ.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from dumo.io import digest
from dumo.io.yaml import yaml_text
from dumo.types import marks_of

# A change of a "free" field does not affect the weights. A change of a "changes" field affects them from then on.
_MARKS_OF_CHANGE = {"free", "changes"}


@dataclass(frozen=True)
class Difference:
    """A field in which two runs differ. Its values are JSON values."""

    field: str  # its dotted path
    was: object
    now: object
    marks: frozenset[str] = frozenset()  # of _MARKS_OF_CHANGE

    @property
    def decides(self) -> bool:
        """Whether the field decides training, so that a resumed run must have the same value."""
        return not self.marks

    @property
    def is_free(self) -> bool:
        """Whether trained weights are the same with either value."""
        return "free" in self.marks

    def __str__(self) -> str:
        return f"{self.field}: {yaml_text(self.was)} recorded, {yaml_text(self.now)} requested"


def differences(
    old: BaseModel, new: BaseModel, prefix: str = "", marks: frozenset[str] = frozenset()
) -> Iterator[Difference]:
    """Yield the fields in which two specs of one class differ.

    Nested specs of one class are compared field by field, other values as a whole. `prefix` is prepended to each path,
    and `marks` are inherited from the parent field.
    """
    for name, field in type(old).model_fields.items():
        was = getattr(old, name)
        now = getattr(new, name)
        marks_here = marks | (marks_of(field).keys() & _MARKS_OF_CHANGE)
        if isinstance(was, BaseModel) and type(was) is type(now):
            yield from differences(was, now, f"{prefix}{name}.", marks_here)
        elif was != now:
            yield Difference(f"{prefix}{name}", to_jsonable_python(was), to_jsonable_python(now), marks_here)


def config_hash(spec: BaseModel) -> str:
    """Return a hash of all fields that decide training, including defaults."""
    return digest.of_bytes(json.dumps(_deciding_fields(spec), sort_keys=True).encode())


def _deciding_fields(part: BaseModel) -> dict[str, Any]:
    """Return the fields of a spec that decide training, as JSON values."""
    tree: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        # Excluded fields are derived from other fields.
        if field.exclude or marks_of(field).keys() & _MARKS_OF_CHANGE:
            continue
        value = getattr(part, name)
        tree[name] = _deciding_fields(value) if isinstance(value, BaseModel) else to_jsonable_python(value)
    return tree
