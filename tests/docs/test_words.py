"""Words that this project wore out stay out of its code and pages (CONTRIBUTING.md, "Plain English")."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src/dumo"
WORDS = (
    "told",
    "beside",
    "so many",
    "in the place of",
    "whence",
    "dear",
    "whoever",
    "to be had",
    "is none's",
    "thither",
)
OURS = ("slopes?", "laws?", "knobs?", "rooms?", "hops?")  # for the field's words: docs/glossary.md
FILES = (file for file in sorted(SRC.rglob("*")) if file.suffix in (".py", ".j2") or file.name == "words.yaml")
TEXTS = {file: file.read_text(encoding="utf-8") for file in FILES}
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in ("log.md", "glossary.md")),
]
CODE = re.compile(r"^```.*?^```$|^ {4}.*?$|`[^`\n]*`|\$[^$\n]+\$|\]\([^)]*\)", re.DOTALL | re.MULTILINE)


def places(text: str, word: str) -> list[int]:
    """The lines that have it."""
    found = re.finditer(rf"\b(?:{word})\b".replace(" ", r"\s+"), text, re.I)
    return [text.count("\n", 0, match.start()) + 1 for match in found]


@pytest.mark.parametrize("word", WORDS)
def test_worn_words_stay_out(word: str) -> None:
    assert [f"{file.relative_to(SRC)}:{n}" for file, text in TEXTS.items() for n in places(text, word)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    text = CODE.sub(lambda code: "\n" * code[0].count("\n"), page.read_text(encoding="utf-8"))
    assert [f"{word}: line {n}" for word in (*WORDS, *OURS) for n in places(text, word)] == []


def test_a_worn_word_is_found() -> None:
    assert places("So many\nlaws of\nthe slope.", "so many") == [1]
    assert places("So many\nlaws of\nthe slope.", "slopes?") == [3]
