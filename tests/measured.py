"""What `dumo reproduce` measured: results that ship, for reports show them, and those that only the pages show."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = {
    path.stem: path
    for folder in ("src/dumo/recipes/results", "docs/results")
    for path in sorted((ROOT / folder).glob("*.json"))
}


def names() -> list[str]:
    """The names of the plans that were measured."""
    return sorted(FILES)


def results(name: str) -> dict[str, Any]:
    """What was measured of a plan."""
    return json.loads(FILES[name].read_text(encoding="utf-8"))
