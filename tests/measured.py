"""What `dumo reproduce` measured, and the pages show."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "docs/results").glob("*.json"))}


def names() -> list[str]:
    """The names of the plans that were measured."""
    return sorted(FILES)


def results(name: str) -> dict[str, Any]:
    """What was measured of a plan."""
    return json.loads(FILES[name].read_text(encoding="utf-8"))
