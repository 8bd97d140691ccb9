"""Paths that a user names, texts and JSON of files; refused with a line where they are not what they should be.

JSON has no NaN and no infinity: they are written as null.
"""

import codecs
import json
import math
import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dumo.io import file
from dumo.runtime.bound import BLOCKS
from dumo.runtime.signals import Stopped
from dumo.types import UserError

DEPTH = re.compile("layer|depth|num_.*block")  # in keys of configs: numbers of layers
MOST = 2**26  # bytes, ours: a long evaluation has thousands, the names of 20,000 classes are half a million


def user_path(text: str, field: str) -> Path:
    """The path with its variables' values. Raises UserError, naming the field, for one that is not set, or no path."""
    expanded = os.path.expandvars(text)
    if unset := re.search(r"\$\{?(\w+)\}?", expanded):
        wrong = f"is {text}, but {unset[1]} is not set: export {unset[1]}=..., or set {field}"
    elif not text or "\0" in expanded:
        wrong = f"{'is empty' if not text else 'has a character that no path has, NUL'}: set it to a path"
    else:
        try:
            return Path(expanded).expanduser()
        except RuntimeError:  # HOME is not set, and the user has no entry, or is not known
            wrong = f"is {text}, and no such home is known: write the whole path, or set HOME"
    raise UserError(f"{field} {wrong}")


def brief(text: object, most: int = 200) -> str:
    """A text that a line has room for: the end of a long one left out."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}…"


def read_text(path: Path, way_out: str, most: int = MOST) -> str:
    """What a file holds, without a byte-order mark.

    Raises UserError, with the way out, where it is not there; for a pipe or a device, which may have no end; for more
    than `most` bytes; and for what is not UTF-8.
    """
    if not path.exists():
        raise UserError(f"{path} is not there: {way_out}")
    if not path.is_file():
        raise UserError(f"{path} is no file: {way_out}")
    size = path.stat().st_size
    if size > most:
        raise UserError(f"{path} has {size:,} bytes, and such a file has at most {most:,}: {way_out}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {encoding_fault(path.read_bytes())}: {way_out}") from error


def decode(data: bytes, where: str, way_out: str) -> str:
    """A text without a byte-order mark. Raises UserError, with the way out, for what is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} {encoding_fault(data)}: {way_out}") from error


def text_lines(path: Path, way_out: str) -> Iterator[str]:
    """The lines of a file, each with its end as it stands there, without a byte-order mark.

    Raises UserError, with the way out, at the first line that is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(lines, 1):
            if not is_unicode(line):  # the bytes that are not UTF-8 have become halves of characters
                fault = encoding_fault(line.encode(errors="surrogateescape"), number)
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


def encoding_fault(data: bytes, first_line: int = 1) -> str:
    """Where bytes are not UTF-8, and a program that makes them so; their first line has a number."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        place = error.start
    else:
        raise ValueError("these bytes are UTF-8")
    line = first_line + data.count(b"\n", 0, place)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
    return f"line {line} is not UTF-8 (byte 0x{data[place]:02x}; iconv -f {encoding} -t utf-8 converts a file)"


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file whole, or not at all; raises as `file.whole` does."""
    file.write(path, (json.dumps(finite(tree), indent=2) + "\n").encode())


def read_json(path: Path, way_out: str, *, infinite: bool = False) -> Any:  # noqa: ANN401, whatever stands there
    """What a file holds; `infinite`: with null for numbers that Python writes and JSON has none of.

    Raises as `read_text`, and UserError for what is not JSON, or lists lists too deep to read.
    """
    text = read_text(path, way_out)
    try:
        return json.loads(text, parse_constant=(lambda _: None) if infinite else _refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): {way_out}") from error


def read_settings(path: Path, way_out: str, *, infinite: bool = False) -> dict[str, Any]:
    """What a model's file of settings holds. Reads and raises as `read_json`, and UserError for what is no JSON object.

    So it does for more layers than any net has: those who build the model would build them one by one.
    """
    found = read_json(path, way_out, infinite=infinite)
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object: {way_out}")
    for part in (found, *(inner for inner in found.values() if isinstance(inner, dict))):
        for key in filter(DEPTH.search, part):
            values = part[key] if isinstance(part[key], list) else [part[key]]
            if any(isinstance(value, int | float) and value > BLOCKS for value in values):
                raise UserError(f"{path}: {key} is above {BLOCKS:,}, which no net has: {way_out}")
    return found


@contextmanager
def foreign(what: str, way_out: str) -> Generator[None, None, None]:
    """Inside, files of others are read, which may say anything: UserError for whatever their readers trip over.

    A GPU that is full, a signal and what the system says of a file pass as they are.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except BaseException as error:
        name, of_system = type(error).__name__, isinstance(error, OSError) and error.strerror
        rust = name == "PanicException"  # of tokenizers, which is no Exception
        if of_system or name == "OutOfMemoryError" or not (rust or isinstance(error, Exception)):
            raise
        said = brief(" ".join(str(error).split()))
        raise UserError(f"{what} ({name}: {said}): {way_out}") from error


def _refuse(name: str) -> None:
    """Python's reader takes them, JSON has none."""
    raise ValueError(f"{name} is no number")


def finite(value: object) -> object:
    """The value with null for every number that JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
