"""README and the pages that answer a user's question read easily: short sentences of common words, and few of them."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from docs.page import README, ROOT

NAMES = "photos captions pretrained sdxl families memory gpus own-objective compare evaluation paper"
PAGES = [README, *(ROOT / f"docs/{name}.md" for name in NAMES.split())]
WORDS, OF_README = 1200, 600  # of a page, as `wc -w` counts them
LENGTH, EASE = 18.0, 50.0  # words of a sentence in the mean; Flesch's reading ease, 50 to 60 being "fairly difficult"
CODE = re.compile(r"^( *)```.*?^\1```$|^(?: {4}|\t).*?$|<!--.*?-->|\$\$.*?\$\$", re.DOTALL | re.MULTILINE)
SHORT = re.compile(r"`[^`\n]*`|\$[^$\n]+\$")  # in a sentence: counts as a noun of two syllables
NUMBER = re.compile(r"(?<=\d)[.,](?=\d)")


class Prose(NamedTuple):
    """How a text reads."""

    words: int
    length: float  # words of a sentence, in the mean
    ease: float  # Flesch (1948)


def syllables(word: str) -> int:
    """Groups of vowels, two where they part ("var-i-ance"), none for a silent e at the end."""
    word = re.sub(r"(?<=[^aeiouyl])e$|(?<=[^aeiouylscgxz])es$|(?<=[^aeiouytd])ed$|(?<=[aeiouy])les?$", "", word.lower())
    return max(1, len(re.findall(r"[aeiouy]+", word)) + len(re.findall(r"(?<![cstx])i[ao]|(?<![gq])ua", word)))


def sentences(page: str) -> list[str]:
    """Those of paragraphs and lists: without code, tables, headings, pictures and addresses."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", CODE.sub("\n\n", page))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|https?://\S+", r"\1", SHORT.sub("object", text))
    lines = ["\n" if re.match(r"\s*(\||#|$)", line) else line for line in text.splitlines()]
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines))
    found = [piece for block in blocks for piece in re.split(r"(?<=[.!?])[*_)\"]*\s+", NUMBER.sub("", block))]
    return [" ".join(piece.split()) for piece in found if re.search(r"[a-z]{2}", piece, re.I)]


def prose(page: str) -> Prose:
    """How a page reads."""
    found = sentences(page)
    words = [word for one in found for word in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", one)]
    length, sounds = len(words) / len(found), sum(map(syllables, words)) / len(words)
    return Prose(len(page.split()), length, 206.835 - 1.015 * length - 84.6 * sounds)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_reads_easily(page: Path) -> None:
    words, length, ease = prose(page.read_text(encoding="utf-8"))
    assert words <= (OF_README if page == README else WORDS)
    assert length <= LENGTH
    assert ease >= EASE


def test_a_heavy_page_is_found() -> None:
    light = (
        "# A\n\nThe dog ran. It saw a cat, and `sat.down` there.\n\n- One [cat](b.md).\n- Two.\n\n| a |\n|---|\n| b |\n"
    )
    assert sentences(light) == ["The dog ran.", "It saw a cat, and object there.", "- One cat.", "- Two."]
    assert prose(light).ease > 100
    heavy = "Unconditional regularization necessitates comprehensive hyperparameter optimization " * 3
    assert prose(heavy).ease < 0
    assert prose("The dog ran and " * 6 + "sat.").length == 25
    counted = {"table": 2, "files": 1, "distances": 3, "computed": 3, "trained": 1, "variance": 3, "diffusion": 3}
    assert {word: syllables(word) for word in counted} == counted
