"""The notebooks run from top to bottom in a fresh kernel, with few steps instead of the many of their parameters."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from docs.test_tutorial import photos
from forked import ENVIRONMENT

FOLDER = Path(__file__).parents[2] / "docs/notebooks"
NET = {"net.width": 8, "train.batch": 8, "train.steps": 3, "evaluate.protocol.samples": 32}
FEW: dict[str, dict[str, Any]] = {
    "digits": {"steps": 20, "samples": 500},
    "own-objective": {"steps": 20, "samples": 500},
    "own-photos": {"minutes": 0.1, "changes": NET},
}

pytestmark = pytest.mark.nightly


def parameters(book: nbformat.NotebookNode) -> tuple[int, set[str]]:
    """Where the cell of parameters is, and their names."""
    ((i, cell),) = ((i, cell) for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ()))
    return i, {node.targets[0].id for node in ast.parse(cell.source).body}  # pyright: ignore


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, tmp_path: Path) -> None:
    book: nbformat.NotebookNode = nbformat.read(file, as_version=4)
    assert [cell.outputs for cell in book.cells if cell.get("outputs")] == [], "clear the outputs before you commit"
    few = FEW[file.stem]
    i, names = parameters(book)
    assert few.keys() <= names
    book.cells.insert(i + 1, nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in few.items())))
    photos(tmp_path / "photos")
    NotebookClient(book, timeout=600, resources={"metadata": {"path": tmp_path}}).execute(env=ENVIRONMENT)
    shown = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in shown)
    assert [output for output in shown if "Warning" in output.get("text", "")] == []
