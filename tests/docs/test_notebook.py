"""The notebooks run from top to bottom in a fresh kernel, with few steps instead of the many of their parameters.

What they show in the repository is of the code that they have: `python docs/notebook.py` ran it.
"""

import ast
import re
import runpy
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import ExifTags, Image, ImageOps

from docs.test_tutorial import photos
from forked import ENVIRONMENT

FOLDER = Path(__file__).parents[2] / "docs/notebooks"
NET = {"net.width": 8, "train.batch": 8, "evaluate.protocol.samples": 32}
FEW: dict[str, dict[str, Any]] = {
    "digits": {"steps": 20, "samples": 500},
    "own-objective": {"steps": 20, "samples": 500},
    "own-photos": {"minutes": 0.1, "changes": NET},
}

TOOL = runpy.run_path(str(FOLDER.with_name("notebook.py")))
FILES = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 900_000  # of all notebooks


def parameters(book: nbformat.NotebookNode) -> tuple[int, set[str]]:
    """Where the cell of parameters is, and their names."""
    ((i, cell),) = ((i, cell) for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ()))
    return i, {node.targets[0].id for node in ast.parse(cell.source).body}  # pyright: ignore


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_shows_what_its_code_made(file: Path) -> None:
    book: nbformat.NotebookNode = nbformat.read(file, as_version=4)
    assert book.metadata["dumo"]["code"] == TOOL["code_hash"](book), "the code has changed: run docs/notebook.py"
    shown = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in shown)
    assert [output for output in shown if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert re.findall(r"/(?:tmp|home|root|work)/", file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_opens_in_colab(file: Path) -> None:
    """By the one constant that names the repository; writing the button again changes nothing."""
    book: nbformat.NotebookNode = nbformat.read(file, as_version=4)
    assert f"github/{TOOL['REPOSITORY']}/blob/main/docs/notebooks/{file.name}" in book.cells[0].source
    assert f"git+https://github.com/{TOOL['REPOSITORY']}" in book.cells[1].source
    before = deepcopy(book)
    TOOL["prepare"](book, file.stem)
    assert book == before


def test_the_notebooks_are_small() -> None:
    assert sum(file.stat().st_size for file in FILES) <= MAX_BYTES


def test_photos_are_compared_upright_and_cut_to_a_square(tmp_path: Path) -> None:
    book: nbformat.NotebookNode = nbformat.read(FOLDER / "own-photos.ipynb", as_version=4)
    code = {cell.id: cell.source for cell in book.cells}
    with pytest.raises(AssertionError, match="upload your photos"):
        exec(code["own-photos-3"], {"photos": str(tmp_path)})

    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:4, 8:16] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    run = SimpleNamespace(sample=lambda **options: torch.zeros(1, 3, 8, 8), pil=lambda images: images)
    names = {"run": run, "show": lambda rows: None, "files": [tmp_path / "photo.png"]}
    names |= {"Image": Image, "ImageOps": ImageOps}
    exec(code["own-photos-9"], names)
    assert [row.mean() for row in names["array"][0]] == [0] * 4 + [255] * 4


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, tmp_path: Path) -> None:
    book: nbformat.NotebookNode = nbformat.read(file, as_version=4)
    few = FEW[file.stem]
    i, names = parameters(book)
    assert few.keys() <= names
    book.cells.insert(i + 1, nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in few.items())))
    photos(tmp_path / "photos")
    NotebookClient(book, timeout=600, resources={"metadata": {"path": tmp_path}}).execute(env=ENVIRONMENT)
    shown = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in shown)
    assert [output for output in shown if "Warning" in output.get("text", "")] == []
