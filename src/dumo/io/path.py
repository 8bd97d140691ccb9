"""Where the user says that something is: a path that may begin with ~ and hold $NAMES of environment variables."""

import os
import re
from pathlib import Path

from dumo.types import UserError


def user_path(text: str, field: str) -> Path:
    """The path with its variables' values. Raises UserError, naming the field, for one that is not set, or no path."""
    expanded = os.path.expandvars(text)
    if unset := re.search(r"\$\{?(\w+)\}?", expanded):
        name = unset[1]
        raise UserError(f"{field} is {text}, but {name} is not set: export {name}=..., or set {field}")
    if not text:
        raise UserError(f"{field} is empty: set it to a path")
    if "\0" in expanded:
        raise UserError(f"{field} has a character that no path has, NUL: set it to a path")
    try:
        return Path(expanded).expanduser()
    except RuntimeError as error:  # HOME is not set, and the user has no entry, or is not known
        raise UserError(f"{field} is {text}, and no such home is known: write the whole path, or set HOME") from error
