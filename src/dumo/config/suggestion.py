"""Suggest the valid name that is nearest to a typed name."""

from collections.abc import Iterable
from difflib import get_close_matches

from dumo.error import UserError
from dumo.io.read import brief
from dumo.runtime.formatting import escape_line


def nearest(name: str, names: list[str]) -> str:
    """Return a hint with the nearest valid name, or with all names if none is near."""
    near_names = get_close_matches(brief(name), names, n=1)
    return f"did you mean '{brief(near_names[0])}'?" if near_names else f"valid: {escape_line(', '.join(names))}"


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError if `name` is not known, with the nearest known name. `what` is a noun, such as "recipe"."""
    names = [*known]
    if name not in names:
        raise UserError(f"there is no {what} '{name}'; {nearest(name, names)}")
