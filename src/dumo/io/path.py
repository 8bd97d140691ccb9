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
    except RuntimeError as error:  # ~someone, who is not known here
        raise UserError(f"{field} is {text}, but there is no such user: set {field} to a path") from error
