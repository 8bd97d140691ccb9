"""Reading what users name: paths, texts and JSON. What is not as it should be raises UserError, with the fix.

- Paths: `user_path` expands one, and `cache_folder` is that of what can be computed again.
- Texts: `read_text`, `text_lines` and `decode_utf8` read UTF-8. `is_unicode` and `is_text_list` test values,
  `_encoding_fault` says where bytes are not UTF-8.
- JSON: `read_json`, `read_settings` and `parse_json` read it, `write_json` writes it. JSON has no NaN and no infinity:
  readers refuse them, or make them null (`nulls_nonfinite`), and `null_nonfinite` makes them null to write.
- Other readers: `explain_foreign_errors` turns whatever they raise into UserError.
- Messages: `brief` and `first_few` shorten what one shows.
"""

import codecs
import json
import math
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from dumo.error import UserError
from dumo.io import file, trained
from dumo.runtime.limits import BLOCKS
from dumo.runtime.signals import Stopped

# Matches the keys of configs that say how many layers there are; not vocab_size_per_layer_input, of Gemma 3n.
_LAYER_COUNT = re.compile("layers|layer$|depths?(_|$)|num_.*block")
# Ours: a long evaluation has thousands of bytes, the names of 20,000 classes half a million.
MAX_FILE_BYTES = 2**26
FEW = 3  # items that a message names: ours
CACHE_VARIABLE = "DUMO_CACHE"  # the environment variable that names the cache's folder


def user_path(text: str, field: str) -> Path:
    """The path with its variables' values; dumo:NAME/FILE is a file of a trained run that comes with dumo.

    Raises UserError, naming the field, for a variable that is not set, or no path.
    """
    shipped_path = trained.path_in(text)
    if shipped_path is not None:
        return shipped_path
    expanded = os.path.expandvars(text)
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise UserError(f"{field} is {text}, but {unset[1]} is not set: export {unset[1]}=..., or set {field}")
    if not expanded:
        raise UserError(f"{field} is empty: set it to a path")
    if "\0" in expanded:
        raise UserError(f"{field} has a character that no path has, NUL: set it to a path")
    try:
        return Path(expanded).expanduser()
    except RuntimeError as error:  # HOME is not set, and the user has no entry, or is not known
        raise UserError(f"{field} is {text}, and no such home is known: write the whole path, or set HOME") from error


def cache_folder() -> Path:
    """The folder that `CACHE_VARIABLE` names, else `dumo` below $XDG_CACHE_HOME or ~/.cache. It need not exist.

    It may be emptied at any time. Raises UserError as `user_path`.
    """
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(os.environ.get(CACHE_VARIABLE) or f"{above}/dumo", CACHE_VARIABLE)


def brief(text: object, max_length: int = 200) -> str:
    """A text for a message; of a longer one the first `max_length` characters and "…"."""
    text = str(text)
    return text if len(text) <= max_length else f"{text[:max_length]}…"


def first_few(items: Iterable[Any], name: Callable[[Any], str] = str, *, max_items: int = FEW) -> str:
    """The names of the first items, `max_items` of them, and how many more there are: `a, b, c and 1,234 more`."""
    items = list(items)
    text = ", ".join(name(item) for item in items[:max_items])
    num_more = len(items) - max_items
    return f"{text} and {num_more:,} more" if num_more > 0 else text


def read_text(path: Path, way_out: str, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a file, without a byte-order mark.

    Raises UserError, with the way out, for a missing file; for a pipe or a device, which may have no end; for more than
    `max_bytes`; and for what is not UTF-8.
    """
    if not path.exists():
        raise UserError(f"{path} is not there: {way_out}")
    if not path.is_file():
        raise UserError(f"{path} is no file: {way_out}")
    size = path.stat().st_size
    if size > max_bytes:
        raise UserError(f"{path} has {size:,} bytes, and such a file has at most {max_bytes:,}: {way_out}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {_encoding_fault(path.read_bytes())}: {way_out}") from error


def decode_utf8(data: bytes, where: str, way_out: str) -> str:
    """A text without a byte-order mark. Raises UserError, with the way out, for what is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} {_encoding_fault(data)}: {way_out}") from error


def text_lines(path: Path, way_out: str) -> Iterator[str]:
    """The lines of a file, each with its end as it stands there, without a byte-order mark.

    Raises UserError, with the way out, at the first line that is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(lines, 1):
            if not is_unicode(line):  # the bytes that are not UTF-8 have become halves of characters
                fault = _encoding_fault(line.encode(errors="surrogateescape"), number)
                raise UserError(f"{path} {fault}: {way_out}")
            yield line


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can name halves of characters, as in "\\ud800", which it cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_text_list(value: object) -> TypeGuard[list[str]]:
    """Whether a value is a list, and all its items are texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _encoding_fault(data: bytes, first_line: int = 1) -> str:
    """Where bytes are not UTF-8, and a program that makes them so. `first_line` is the number of their first line."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        position = error.start
    else:
        raise ValueError("these bytes are UTF-8")
    line = first_line + data.count(b"\n", 0, position)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
    return f"line {line} is not UTF-8 (byte 0x{data[position]:02x}; iconv -f {encoding} -t utf-8 converts a file)"


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a JSON file whole, or not at all. Raises OSError."""
    file.write(path, (json.dumps(null_nonfinite(tree), indent=2) + "\n").encode())


def read_json(path: Path, way_out: str, *, nulls_nonfinite: bool = False) -> Any:  # noqa: ANN401, whatever stands there
    """The value in a JSON file. Raises UserError where the file cannot be read, and as `parse_json`."""
    return parse_json(read_text(path, way_out), str(path), way_out, nulls_nonfinite=nulls_nonfinite)


def parse_json(text: str, where: str, way_out: str, *, nulls_nonfinite: bool = False) -> Any:  # noqa: ANN401, as above
    """The value in a text of JSON, which `where` names in messages.

    `nulls_nonfinite`: NaN, infinities and numbers above the largest float, such as 1e999, become null.

    Raises UserError, with the way out, for what is not JSON, is nested too deep, or has such a number.
    """
    read_constant = _null_constant if nulls_nonfinite else _refuse_constant
    read_float = _null_large_float if nulls_nonfinite else _refuse_large_float
    try:
        return json.loads(text, parse_constant=read_constant, parse_float=read_float)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): {way_out}") from error


def read_settings(path: Path, way_out: str, *, nulls_nonfinite: bool = False) -> dict[str, Any]:
    """The settings in a model's JSON file; `nulls_nonfinite` as in `parse_json`.

    Raises UserError where it cannot be read, or holds no JSON object; and for more layers than any net has, which a
    library would build one by one.
    """
    settings = read_json(path, way_out, nulls_nonfinite=nulls_nonfinite)
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no JSON object: {way_out}")
    sections = [settings, *(section for section in settings.values() if isinstance(section, dict))]
    for section in sections:
        for key, value in section.items():
            if not _LAYER_COUNT.search(key):
                continue
            counts = value if isinstance(value, list) else [value]
            if any(isinstance(count, int | float) and count > BLOCKS for count in counts):
                raise UserError(f"{path}: {key} is above {BLOCKS:,}, which no net has: {way_out}")
    return settings


@contextmanager
def explain_foreign_errors(what: str, way_out: str) -> Generator[None, None, None]:
    """Raise UserError, "`what` (the error): `way_out`", for whatever a library raises inside, given others' files.

    A GPU out of memory, a signal and the system's error about a file pass as they are.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except BaseException as error:
        name = type(error).__name__
        is_system_error = isinstance(error, OSError) and bool(error.strerror)
        is_rust_panic = name == "PanicException"  # of tokenizers, which is no Exception
        is_exception = isinstance(error, Exception) or is_rust_panic
        if is_system_error or name == "OutOfMemoryError" or not is_exception:
            raise
        message = brief(" ".join(str(error).split()))
        raise UserError(f"{what} ({name}: {message}): {way_out}") from error


def _refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and infinities, which Python's reader takes and JSON has not."""
    raise ValueError(f"{name} is no number")


def _null_constant(name: str) -> None:
    """None in place of NaN and infinities."""


def _refuse_large_float(digits: str) -> float:
    """The number. Raises ValueError for one that Python would read as infinity."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{brief(digits, 40)} is above the largest number, {sys.float_info.max:.1e}")
    return number


def _null_large_float(digits: str) -> float | None:
    """The number; None in place of one that Python would read as infinity."""
    number = float(digits)
    return None if math.isinf(number) else number


def null_nonfinite(value: object) -> object:
    """The value with None for NaN and infinities, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: null_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [null_nonfinite(inner) for inner in value]
    return value
