"""docs/measure.py: what a plan made anew takes the place of what the pages show."""

import json
import runpy
from pathlib import Path
from typing import Any

import measured

ROOT = Path(__file__).parents[2]


def tool() -> dict[str, Any]:
    """What docs/measure.py defines."""
    return runpy.run_path(str(ROOT / "docs/measure.py"))


def test_all_results_of_the_pages_are_measured() -> None:
    assert tool()["kept_results"]() == measured.FILES


def test_results_and_shown_pictures_are_kept(tmp_path: Path) -> None:
    made = tmp_path / "runs/reproduce/two-laptop"
    pages = tmp_path / "docs"
    for folder in (made, pages):
        folder.mkdir(parents=True)
    results = {"files": [str(made / name) for name in ("two.png", "cells.png", "table.md", "results.json")]}
    (made / "results.json").write_text(json.dumps(results))
    for name in ("two.png", "cells.png", "table.md"):
        (made / name).write_text("new")
    for name in ("two.png", "table.md"):
        (pages / name).write_text("old")
    copies = tool()["keep"](made, tmp_path / "two.json", pages)
    assert copies == [tmp_path / "two.json", pages / "two.png"]
    assert json.loads((tmp_path / "two.json").read_text()) == results
    assert (pages / "two.png").read_text() == "new"
    assert not (pages / "cells.png").exists()  # which no page shows
    assert (pages / "table.md").read_text() == "old"
