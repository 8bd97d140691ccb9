"""Run the notebooks and store their outputs; needs $DUMO_DATA/imagenet-sample.

    python docs/notebook.py [NAME ...]    # digits, own-objective, own-photos; by default all

`run` executes a notebook from top to bottom in an empty folder, own-photos with a thousand photos of ImageNet.
`prepare` writes what all notebooks share: the button that opens them in Colab, and the cell that installs dumo there.
`code_hash` goes into the notebook with the outputs. A test refuses a notebook whose code has changed since it ran.
"""

import hashlib
import os
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from pyarrow.parquet import ParquetFile

REPOSITORY = "OWNER/dumo"  # on GitHub: put the owner here, then `python docs/notebook.py --links`
FOLDER = Path(__file__).with_name("notebooks")
BUTTON = "[![Open in Colab](colab.svg)]"
INSTALL = """\
from importlib.util import find_spec

if find_spec("dumo") is None:  # as on Colab
    %pip install --quiet git+https://github.com/{repository}"""
PATIENCE = 1800  # seconds per cell


def code_hash(book: NotebookNode) -> str:
    """Return the SHA-256 of all code cells."""
    code = "\0".join(cell.source for cell in book.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def prepare(book: NotebookNode, name: str) -> None:
    """Put the button below the heading, and the cell that installs dumo below the first text."""
    heading, *lines = [line for line in book.cells[0].source.splitlines() if not line.startswith(BUTTON)]
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/docs/notebooks/{name}.ipynb"
    text = "\n".join(lines).strip("\n")
    book.cells[0].source = f"{heading}\n\n{BUTTON}({address})\n\n{text}"
    if "install" not in book.cells[1].metadata.get("tags", ()):
        cell = nbformat.v4.new_code_cell(id=f"{name}-install", metadata={"tags": ["install"]})
        book.cells.insert(1, cell)
    book.cells[1].source = INSTALL.format(repository=REPOSITORY)


def write_photos(folder: Path) -> None:
    """The photos of imagenet-sample, 256 pixels high and wide."""
    table = next(iter(Path(os.environ["DUMO_DATA"], "imagenet-sample").rglob("*.parquet")))
    rows = ParquetFile(table).read(["image"]).to_pylist()
    folder.mkdir()
    for number, row in enumerate(rows):
        (folder / f"{number:04d}.jpg").write_bytes(row["image"]["bytes"])


def run(book: NotebookNode) -> None:
    """Execute all cells in an empty folder, and drop stderr, which shows progress."""
    with TemporaryDirectory() as folder:
        if any('photos = "photos"' in cell.source for cell in book.cells):
            write_photos(Path(folder, "photos"))
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(book, timeout=PATIENCE, resources=resources, record_timing=False)
        client.execute(env={**os.environ, "COLUMNS": "80"})
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    book.metadata = {"kernelspec": book.metadata["kernelspec"], "language_info": {"name": "python"}}
    book.metadata["dumo"] = {"code": code_hash(book)}


def main(words: list[str]) -> None:
    """Run the named notebooks, by default all; with --links only rewrite the button and the installation cell."""
    names = [word for word in words if word != "--links"] or sorted(file.stem for file in FOLDER.glob("*.ipynb"))
    for name in names:
        file = FOLDER / f"{name}.ipynb"
        book = nbformat.read(file, as_version=4)
        ran = book.metadata.get("dumo", {}).get("code") == code_hash(book)
        prepare(book, name)
        if "--links" not in words:
            run(book)
        elif ran:  # a changed address in the installation cell does not require running the notebook again
            book.metadata["dumo"] = {"code": code_hash(book)}
        file.write_text(nbformat.writes(book, indent=1).rstrip("\n") + "\n", encoding="utf-8")
        kinds = Counter(output.output_type for cell in book.cells for output in cell.get("outputs", ()))
        print(f"{name}: {file.stat().st_size / 1000:.0f} kB, {dict(kinds)}")


if __name__ == "__main__":
    main(sys.argv[1:])
