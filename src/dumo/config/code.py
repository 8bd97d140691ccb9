"""Hashes of the code of classes from outside (`module:Class`): a run resumes only with the code that it began with.

`codes_of` hashes what a spec uses, for `resolved` in run.yaml; `require_same_code` compares with it later.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from dumo.config.source import CODE
from dumo.types import Spec, UserError
from dumo.types.outside import TAG, code_hash, kind_of


def codes_of(part: object) -> Iterator[tuple[str, str | None]]:
    """The name of each class from outside in a spec, at any depth, with the hash of its code; None: no source is there.

    What is no spec has none.
    """
    if isinstance(part, Spec):
        if kind_of(part) == TAG:
            yield getattr(part, "kind", ""), code_hash(part)
        for name in type(part).model_fields:
            yield from codes_of(getattr(part, name))


def require_same_code(spec: Spec, resolved: Mapping[str, JsonValue], folder: Path) -> None:
    """Raise UserError where the code of a class from outside has changed since the run in `folder` began.

    `resolved` has the hashes of that time under `code`; without them nothing is compared.
    """
    hash_by_name = resolved.get(CODE)
    if not isinstance(hash_by_name, dict):
        return
    for name, hash_now in codes_of(spec):
        if hash_by_name.get(name) != hash_now:
            raise UserError(
                f"{name} is not the code that {folder} was trained with: bring that back, or train in another folder"
            )
