"""The words of a report (words.yaml): what a measured number is called, which way is better, and what it says.

Nothing that a file of numbers calls a thing stands on the page by that key: what has no words here is at least spaced.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dumo.io.yaml import parse
from dumo.types import Objective

FIRST_LINE = re.compile(r"([^(:]+) \(([^)]+)\): (.+)")


@dataclass(frozen=True)
class Word:
    """A title for the head of a column, which way is better, and a sentence."""

    title: str
    better: str = ""
    meaning: str = ""


WORDS = parse(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))


def words_of(section: str) -> dict[str, Word]:
    """A section of words.yaml, by key."""
    return {key: Word(**fields) for key, fields in WORDS[section].items()}


MERITS = words_of("merits")  # by column of a table
BASELINES = words_of("baselines")
WATCHED = words_of("watched")  # notes of a step
BEFORE = words_of("before")["fd"]
REAL = BASELINES["halves"].title
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
    first_line = FIRST_LINE.match(sys.modules[type(objective).__module__].__doc__ or "")
    return Method(*first_line.groups()) if first_line else Method(objective.kind)


def watched(name: str) -> Word:
    """The words for a note, or for that of a part: `right_d` is `right`, of d."""
    note, _, part = name.rpartition("_")
    if name in WATCHED or note not in WATCHED:
        return word(WATCHED, name)
    return replace(WATCHED[note], title=f"{WATCHED[note].title}, {part}")


def merits(columns: list[str]) -> dict[str, Word]:
    """The words for the columns of a table; `fd` next to `fd_grey` is the same before rounding."""
    word_by_column = {key: word(MERITS, key) for key in columns}
    if {"fd", "fd_grey"} <= word_by_column.keys():
        word_by_column["fd"] = BEFORE
    return word_by_column
