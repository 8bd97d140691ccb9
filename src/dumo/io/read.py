"""Read paths, texts and JSON from users.

- Paths: `user_path` expands a path, and `cache_folder` returns the folder for recomputable files.
- Texts: `read_text`, `text_lines` and `decode_utf8` read UTF-8. `is_unicode` and `is_text_list` test values.
- JSON: `read_json` and `parse_json` read it, `write_json` writes it. `null_nonfinite` replaces NaN and infinity, which
  JSON does not have, by null.
- Messages: `brief` and `first_few` shorten texts and lists.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from dumo.error import UserError
from dumo.io import file, run_places
from dumo.runtime.formatting import escape_line

FEW = 3  # items that a message names
CACHE_VARIABLE = "DUMO_CACHE"  # the environment variable that names the cache's folder


def user_path(text: str, field: str) -> Path:
    """Expand ~ and environment variables in a path; dumo:NAME/FILE is a file of a trained run that ships with dumo.

    An existing path is not expanded, because folders may be called a$b or ~x.

    Raises UserError, naming the field, for an unknown variable or home, and for an empty text, which would be the
    current folder.
    """
    shipped_path = run_places.path_in(text)
    if shipped_path is not None:
        return shipped_path
    if text and "\0" not in text and os.path.lexists(text):
        return Path(text)
    expanded = os.path.expandvars(text)
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise UserError(f"{field} is {text}, but {unset[1]} is not set: export {unset[1]}=..., or set {field}")
    if not expanded:
        raise UserError(f"{field} is empty: set it to a path")
    try:
        return Path(expanded).expanduser()
    except RuntimeError as error:  # HOME is not set, and the user has no entry
        raise UserError(
            f"{field} is {text}, but that home directory cannot be determined: give the full path, or set HOME"
        ) from error


def cache_folder() -> Path:
    """Return the folder that `CACHE_VARIABLE` names, else `dumo` below $XDG_CACHE_HOME or ~/.cache. It need not exist.

    It may be emptied at any time. Raises UserError as `user_path`.
    """
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(os.environ.get(CACHE_VARIABLE) or f"{above}/dumo", CACHE_VARIABLE)


def brief(text: object, max_length: int = 200) -> str:
    """Return a text in one line for a message, truncated to `max_length` characters and "…"."""
    text = str(text)
    return escape_line(text) if len(text) <= max_length else f"{escape_line(text[:max_length])}…"


def first_few(items: Iterable[Any], name: Callable[[Any], str] = str, *, max_items: int = FEW) -> str:
    """Return the names of the first items in one line, and the number of further items: `a, b, c and 1,234 more`."""
    items = list(items)
    text = ", ".join(escape_line(name(item)) for item in items[:max_items])
    num_more = len(items) - max_items
    return f"{text} and {num_more:,} more" if num_more > 0 else text


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte-order mark. Raises OSError, and UserError for invalid UTF-8."""
    return "".join(text_lines(path, newline=None))


def decode_utf8(data: bytes, where: str) -> str:
    """Return a text without a byte-order mark. Raises UserError, which names `where`, for invalid UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 ({error}): convert it, e.g. with iconv -t utf-8") from error


def text_lines(path: Path, newline: str | None = "") -> Iterator[str]:
    """Yield the lines of a file, without a byte-order mark; `newline` is as for `open`.

    Raises OSError, and UserError for invalid UTF-8.
    """
    with file.named_in_errors(path), path.open(encoding="utf-8-sig", newline=newline) as lines:
        try:
            yield from lines
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error}): convert it, e.g. with iconv -t utf-8") from error


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded in UTF-8. JSON may have lone surrogates, such as "\\ud800", which cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_text_list(value: object) -> TypeGuard[list[str]]:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a JSON file atomically. Raises OSError."""
    file.write(path, (json.dumps(null_nonfinite(tree), indent=2) + "\n").encode())


def read_json(path: Path) -> Any:  # noqa: ANN401, whatever stands there
    """Return the value in a JSON file. Raises OSError, and UserError as `parse_json`."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:  # noqa: ANN401, as above
    """Parse JSON from `where`, which is named in messages. Raises UserError for invalid JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def null_nonfinite(value: object) -> object:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: null_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [null_nonfinite(inner) for inner in value]
    return value
