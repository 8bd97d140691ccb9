"""The words of a report (words.yaml): what a measured number is called, which way is better, and what it says.

Nothing that a file of numbers calls a thing stands on the page by that key: what has no words here is at least spaced.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dumo.io.yaml import parse
from dumo.types import Objective

FIRST_LINE = re.compile(r"([^(:]+) \(([^)]+)\): (.+)")


@dataclass(frozen=True)
class Word:
    """A title for the head of a column, which way is better, and a sentence."""

    title: str
    better: str = ""
    meaning: str = ""


def _read(rows: Mapping[str, Any]) -> dict[str, Word]:
    return {key: Word(**of) for key, of in rows.items()}


WORDS = parse(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
MERITS, BASELINES, WATCHED = (_read(WORDS[name]) for name in ("merits", "baselines", "watched"))
BEFORE, REAL = Word(**WORDS["before"]["fd"]), BASELINES["halves"].title
STATES: dict[str, str] = WORDS["states"]
NETS: dict[str, str] = WORDS["nets"]  # by kind
HEADS: dict[str, str] = WORDS["heads"]  # of more than DuMo's v and u


def word(words: Mapping[str, Word], key: str) -> Word:
    """The words for a key; its own, spaced, where there are none."""
    return words.get(key) or Word(key.replace("_", " "))


class Method(NamedTuple):
    """An objective as a reader knows it: its name, its source, and a line that says what it does."""

    name: str
    source: str = ""
    what: str = ""

    def __str__(self) -> str:
        """All of it, as its module says it."""
        return f"{self.name} ({self.source}): {self.what}" if self.source else self.name


def method(objective: Objective) -> Method:
    """By the first line of its module, `Name (source): what it does.`; of one that has no such line its kind."""
    found = FIRST_LINE.match(sys.modules[type(objective).__module__].__doc__ or "")
    return Method(*found.groups()) if found else Method(objective.kind)


def watched(name: str) -> Word:
    """The words for a note, or for that of a part: `right_d` is `right`, of d."""
    of, _, part = name.rpartition("_")
    if name in WATCHED or of not in WATCHED:
        return word(WATCHED, name)
    return replace(WATCHED[of], title=f"{WATCHED[of].title}, {part}")


def merits(columns: list[str]) -> dict[str, Word]:
    """The words for the columns of a table; `fd` next to `fd_grey` is the same before rounding."""
    found = {key: word(MERITS, key) for key in columns}
    return found | ({"fd": BEFORE} if {"fd", "fd_grey"} <= found.keys() else {})
