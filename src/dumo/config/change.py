"""Merge the changes of a file into its base, or of an override into a spec (ADR 0002).

If the `kind` of a spec changes, the fields of the old kind are dropped, and the defaults of the new kind apply.
"""

from typing import Any

from dumo.error import UserError
from dumo.io.read import brief
from dumo.io.yaml import yaml_text


def merge(base: dict[str, Any], change: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Return a new tree: the base with the changes of a file. `where` is the dotted path to both, ending in a dot.

    Mappings are merged key by key; other values, an empty mapping or another kind replace the base's value. Raises
    UserError if a change has fields for a plain value of the base.
    """
    merged = dict(base)
    for key, new in change.items():
        old = base.get(key)
        if isinstance(new, dict) and old is not None and not isinstance(old, dict):
            raise UserError(
                f"{where}{key} is {brief(yaml_text(old))} in the base, a plain value: write its fields there"
            )
        if isinstance(new, dict) and new and isinstance(old, dict) and not has_other_kind(old, new.get("kind")):
            merged[key] = merge(old, new, f"{where}{key}.")
        else:
            merged[key] = new
    return merged


def has_other_kind(part: dict[str, Any], kind: object, default: str | None = None) -> bool:
    """Whether `kind` is given and differs from the kind of a part, which is `default` if the part has none."""
    return kind is not None and part.get("kind", default or kind) != kind
