"""Files of text: whole, in UTF-8, and no larger than what people and this program write."""

from pathlib import Path

from dumo.types import UserError

MOST = 2**26  # bytes, ours: a long evaluation has thousands, the names of 20,000 classes are half a million


def brief(text: object, most: int = 200) -> str:
    """A text that a line has room for: the end of a long one left out."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}…"


def read_text(path: Path, way_out: str, most: int = MOST) -> str:
    """What a file holds. Raises FileNotFoundError for none; UserError, with the way out, for what is no such file.

    That is a pipe or a device, which may have no end; more than `most` bytes; or what is not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: {way_out}")
    if (size := path.stat().st_size) > most:
        raise UserError(f"{path} has {size:,} bytes, and such a file has at most {most:,}: {way_out}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text ({error}): {way_out}") from error
