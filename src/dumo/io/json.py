"""Files of JSON, written whole. JSON has no NaN and no infinity: they are written as null."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dumo.io import file
from dumo.io.text import read_text
from dumo.types import UserError


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file whole, or not at all; raises as `file.whole` does."""
    file.write(path, (json.dumps(finite(tree), indent=2) + "\n").encode())


def read_json(path: Path, way_out: str) -> Any:  # noqa: ANN401, whatever stands there
    """What a file holds. Raises as `read_text`, and UserError for what is not JSON, or lists lists too deep to read."""
    text = read_text(path, way_out)
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): {way_out}") from error


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
