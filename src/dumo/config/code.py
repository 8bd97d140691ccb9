"""Hashes of the code of classes from outside, by which a run knows that it is still the same program."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from dumo.config.source import CODE
from dumo.types import Spec, UserError
from dumo.types.outside import TAG, code, kind_of


def codes_of(part: object) -> Iterator[tuple[str, str | None]]:
    """The name of every class from outside in a spec, at any depth, and a hash of its code."""
    if isinstance(part, Spec):
        if kind_of(part) == TAG:
            yield getattr(part, "kind", ""), code(part)
        for name in type(part).model_fields:
            yield from codes_of(getattr(part, name))


def require_same_code(spec: Spec, resolved: Mapping[str, JsonValue], folder: Path) -> None:
    """Raise UserError if a class from outside is not as it was when the run in this folder began, by what it found."""
    was = resolved.get(CODE)
    for name, now in codes_of(spec):
        if isinstance(was, dict) and was.get(name) != now:
            raise UserError(
                f"{name} is not the code that {folder} was trained with: bring that back, or train in another folder"
            )
