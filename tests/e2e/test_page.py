"""The Python on the pages runs as it is written, block after block, where a reader would run it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.turn import tier
from e2e.shell import TINY

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def execute(page: Path) -> int:
    """Run every Python block of a page in one namespace; an error names the page's line. Returns how many there are."""
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__page__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], page, "exec"), names)
    return len(blocks)


@pytest.mark.parametrize("name", [pytest.param(name, marks=tier(name)) for name in ("library", "loop", "gpus")])
def test_python_on_a_page_runs_as_written(name: str, here: Path) -> None:
    """README's runs in test_readme.py, that of own-objective.md in docs/test_tutorial.py."""
    assert execute(ROOT / f"docs/{name}.md")


@tier("library")
def test_a_class_of_a_file_is_trained_by_the_line_below_it(here: Path) -> None:
    page = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    (body,) = (block[1] for block in BLOCK.finditer(page) if "class Robust" in block[1])
    (here / "mine.py").write_text(body)
    (line,) = re.findall(r"^PYTHONPATH=\. dumo (.*mine:Robust)$", page, re.MULTILINE)
    command = [sys.executable, "-c", "from dumo.cli import main; main()", *shlex.split(line), *TINY]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mine:Robust: " in (here / "runs/digits-flow-matching/run.yaml").read_text()


def test_an_error_on_a_page_is_found(here: Path) -> None:
    page = here / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\n```sh\nfalse\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as found:
        execute(page)
    assert found.traceback[-1].lineno == 12 - 1  # pytest counts from 0
