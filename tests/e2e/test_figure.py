"""`dumo reproduce`: whole, in one command, at the scale of a test."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from e2e.shell import call, files, refused

pytestmark = pytest.mark.nightly


def test_figure_3(here: Path) -> None:
    assert call("reproduce", "fig3", "--scale", "smoke").code == 0
    folder = here / "runs/reproduce/fig3-smoke"
    results = json.loads((folder / "results.json").read_text())
    assert sorted(results["files"]) == [
        f"runs/reproduce/fig3-smoke/{name}" for name in ("fig3.png", "results.json", "table.md")
    ]

    assert [(row["objective"], row["velocity_ratio"]) for row in results["table"]] == [
        *(("MeanFlow", ratio) for ratio in (0, 0.2, 0.4, 0.6, 0.8, 1)),
        ("DuMo", None),
    ]
    assert {row["steps"] for row in results["table"]} == {40}
    assert all(row["mmd2"] > 0 for row in results["table"])
    assert all(len(cell["results"]) == 1 and cell["results"][0]["nfe"] == 1 for cell in results["cells"])
    assert results["origin"]["command"] == "dumo reproduce fig3 --scale smoke"
    assert results["origin"]["versions"].keys() == {"dumo", "torch", "python"}
    with Image.open(folder / "fig3.png") as picture:
        assert 1.4 * picture.height < picture.width < 2 * picture.height  # eight panels in two rows
    assert len((folder / "table.md").read_text(encoding="utf-8").splitlines()) == 2 + 2 + 7

    cells = files(folder / "cells")
    again = call("reproduce", "fig3", "--scale", "smoke")
    assert again.code == 0
    assert files(folder / "cells") == cells  # finished cells are kept
    assert all(str(file) in again.out.splitlines() for file in results["files"])

    stopped = next(folder.glob("cells/dumo-*"))
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "evaluation.json").unlink()
    assert call("reproduce", "fig3", "--scale", "smoke").code == 0
    assert json.loads((folder / "results.json").read_text())["table"] == results["table"]
    refused("reproduce", "fig3", "--scale", "paper", named=("fig3 has no scale 'paper'", "smoke and laptop"))
