"""llms.txt and AGENTS.md are what `make docs` writes of the pages."""

import runpy
from pathlib import Path

from docs.test_link import wrong

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "docs/agents.py"))


def test_what_programs_read_first_is_of_the_pages() -> None:
    for path, text in TOOL["texts"]().items():
        assert path.read_text(encoding="utf-8") == text, "make docs writes it again"
        assert wrong(path, text) == []


def test_all_pages_are_listed() -> None:
    """But decisions and the reference, which pages of their own list."""
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    elsewhere = ("docs/adr/", "docs/reference/")
    pages = [page.relative_to(ROOT).as_posix() for page in sorted((ROOT / "docs").rglob("*.md"))]
    assert [page for page in pages if not page.startswith(elsewhere) and f"]({page})" not in text] == []


def test_a_first_sentence_is_found() -> None:
    page = "# A\n\n```sh\nno\n```\n\n| no |\n\n![no](no.png)\n\nThe **first** [one](b.md), e.g.\nhere: x. No.\n"
    assert TOOL["first_sentence"](page) == "The first one, e.g."
    assert TOOL["first_sentence"]("# A\n\nSo:\n\n    no\n") == "So."
    assert TOOL["first_sentence"]("# A\n\n::: dumo.cli\n") == ""
