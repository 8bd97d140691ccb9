"""An objective by its name, or by a dict of its fields."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from dumo.objectives import Objective
from dumo.types import Objective as AnyObjective
from dumo.types import UserError


def objective_of(given: str | Mapping[str, Any] | AnyObjective) -> AnyObjective:
    """The objective of this kind, or with these fields; one that is built stays. Raises UserError for no such kind."""
    require_objective(given)
    if not isinstance(given, str | Mapping):
        return given
    fields = {"kind": given} if isinstance(given, str) else dict(given)
    kinds = sorted(member.model_fields["kind"].default for member in get_args(get_args(Objective)[0])[:-1])
    kind = fields.get("kind")
    if kind not in kinds and ":" not in str(kind):
        near = get_close_matches(str(kind), kinds, n=1)
        raise UserError(f"objective '{kind}': choose {f'{near[0]}' if near else 'one of ' + ', '.join(kinds)}")
    try:
        return TypeAdapter[AnyObjective](Objective).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise UserError(f"objective '{kind}', {where}: {first['msg']}") from error


def require_objective(given: object) -> None:
    """Raise UserError for what is no name, no fields and no objective, such as a class of these."""
    if isinstance(given, type) or not isinstance(given, str | Mapping | AnyObjective):
        raise UserError(f"objective {given!r} is none: give its name, a dict of its fields, or dumo.objectives.DuMo()")
