"""Words that this project wore out stay out of its code (CONTRIBUTING.md, "Plain English")."""

import re
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src/dumo"
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
FILES = (file for file in sorted(SRC.rglob("*")) if file.suffix in (".py", ".j2") or file.name == "words.yaml")
TEXTS = {file: file.read_text(encoding="utf-8") for file in FILES}


@pytest.mark.parametrize("word", WORDS)
def test_worn_words_stay_out(word: str) -> None:
    found = re.compile(rf"\b{word}\b".replace(" ", r"\s+"), re.I)
    places = [
        f"{file.relative_to(SRC)}:{text.count(chr(10), 0, match.start()) + 1}"
        for file, text in TEXTS.items()
        for match in found.finditer(text)
    ]
    assert places == []
