"""Merge the changes of a file into its base, or of an override into a part (ADR 0002).

A part with another `kind` begins with that kind's defaults: the fields of the old kind are dropped.
"""

from typing import Any

from dumo.error import UserError
from dumo.io.read import brief
from dumo.io.yaml import yaml_text


def merge(base: dict[str, Any], change: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The base with the changes of a file, as a new tree. `where` is the dotted path to both, with a dot at its end.

    Mappings are merged key by key; anything else, an empty mapping and another kind replace what was there. Raises
    UserError if fields are given to a value of the base that has none.
    """
    merged = dict(base)
    for key, new in change.items():
        old = base.get(key)
        if isinstance(new, dict) and old is not None and not isinstance(old, dict):
            raise UserError(
                f"{where}{key} is {brief(yaml_text(old))} in the base, a value without fields: write them out there"
            )
        if isinstance(new, dict) and new and isinstance(old, dict) and not has_other_kind(old, new.get("kind")):
            merged[key] = merge(old, new, f"{where}{key}.")
        else:
            merged[key] = new
    return merged


def has_other_kind(part: dict[str, Any], kind: object, default: str | None = None) -> bool:
    """Whether `kind` is given, and the part has a kind that is another; `default` is that of a part that says none."""
    return kind is not None and part.get("kind", default or kind) != kind
