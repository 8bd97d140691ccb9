"""Every link between the pages leads to a file that is there, and to a heading that it has."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "llms.txt", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
)
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: small letters, hyphens for spaces, a number where one comes again."""
    found, seen = set[str](), Counter[str]()
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def wrong(page: Path, text: str) -> list[str]:
    """The targets of the page's relative links that are not there."""
    missing: list[str] = []
    for link in LINK.finditer(CODE.sub("", text)):
        path, _, anchor = link["target"].partition("#")
        there = page.parent / path if path else page
        if ":" not in path and (not there.exists() or (anchor and anchor not in anchors(there))):
            missing.append(link["target"])
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert wrong(page, page.read_text(encoding="utf-8")) == []


def test_a_wrong_link_is_found() -> None:
    page = ROOT / "docs/glossary.md"
    said = "[a](no.md) [b](gpus.md) [c](gpus.md#nowhere) [d](#words) [e](#wor) [f](https://x.org/y#z) `[g](h)`"
    assert wrong(page, said) == ["no.md", "gpus.md#nowhere", "#wor"]


def test_all_pages_are_listed() -> None:
    """But decisions and the reference, which pages of their own list."""
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES if (ROOT / "docs") in page.parents]
    elsewhere = ("docs/adr/", "docs/reference/")
    assert [page for page in pages if not page.startswith(elsewhere) and f"]({page})" not in text] == []


def test_code_names_pages_that_are_there() -> None:
    named = {
        (file.name, page)
        for folder in ("src", "tests")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".yaml", ".j2")
        for page in re.findall(r"docs/[\w/-]+\.md", file.read_text(encoding="utf-8"))
    }
    assert named
    assert [pair for pair in sorted(named) if not (ROOT / pair[1]).exists()] == []
