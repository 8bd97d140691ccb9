"""The marks and the default of a spec's field. Each mark is defined in `dumo.types`.

A mark says how the field may change, or how it is shown:

- free: a resumed run may have another value, and nothing notes it;
- changes: a resumed run may have another value, and run.yaml lists the change;
- where: the field is a path; what lies there is known by its hash;
- pinned: the field is a hash, taken when the run began; None in runs of an older dumo;
- quiet: the field is not shown at its default.
"""

from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo


def marks_of(field: FieldInfo) -> Mapping[str, Any]:
    """A field's marks by name; empty where it has none."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def default_of(field: FieldInfo) -> object:
    """A field's default; pydantic's PydanticUndefined where it has none."""
    return field.get_default(call_default_factory=True)
