"""Titles and descriptions of the numbers in a report (words.yaml).

`word` looks up a key in one of the tables below, `watched` a diagnostic of a training step, and `merits` the columns of
a table of scores; `method` describes an objective. A key without an entry becomes a title with spaces.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dumo.io.yaml import parse_yaml
from dumo.types import Objective

# Matches the first line of an objective's module, `Name (source): description`.
_FIRST_LINE = re.compile(r"([^(:]+) \(([^)]+)\): (.+)")


@dataclass(frozen=True)
class Word:
    """The title and description of a number."""

    title: str
    # Whether higher or lower is better, as in words.yaml; "" means neither.
    better: str = ""
    # A sentence that describes the number.
    meaning: str = ""


_WORDS = parse_yaml(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))


def _words_of(section: str) -> dict[str, Word]:
    """Return the words of a section of words.yaml, by key."""
    return {key: Word(**fields) for key, fields in _WORDS[section].items()}


# By score, by baseline, and by diagnostic of a training step.
MERITS = _words_of("merits")
BASELINES = _words_of("baselines")
WATCHED = _words_of("watched")
# Replaces the words of `fd` in a table that also has the distance after rounding to grey values.
_FD_BEFORE_ROUNDING = _words_of("before")["fd"]
# Descriptions of networks by kind, and of heads other than v and u by name.
NETS: dict[str, str] = _WORDS["nets"]
HEADS: dict[str, str] = _WORDS["heads"]


def word(words: Mapping[str, Word], key: str) -> Word:
    """Return the entry of a key. By default its title is the key with spaces."""
    return words.get(key) or Word(key.replace("_", " "))


class Method(NamedTuple):
    """The name, source and one-line description of an objective."""

    name: str
    source: str = ""
    what: str = ""

    def __str__(self) -> str:
        """Return the first line of the objective's module, or the name if the source is unknown."""
        return f"{self.name} ({self.source}): {self.what}" if self.source else self.name


def method(objective: Objective) -> Method:
    """Return the method of an objective from the first line of its module, `Name (source): description`.

    If the module has no such line, the name is the objective's kind.
    """
    first_line = _FIRST_LINE.match(sys.modules[type(objective).__module__].__doc__ or "")
    return Method(*first_line.groups()) if first_line else Method(objective.kind)


def watched(name: str) -> Word:
    """Return the words for a diagnostic of a training step.

    `accuracy_d` is the diagnostic `accuracy` of the part d, with the title "<title of accuracy>, d".
    """
    note, _, part = name.rpartition("_")
    if name in WATCHED or note not in WATCHED:
        return word(WATCHED, name)
    return replace(WATCHED[note], title=f"{WATCHED[note].title}, {part}")


def merits(columns: list[str]) -> dict[str, Word]:
    """Return the words for the columns of a table of scores, by column.

    `fd` and `fd_grey` are one distance before and after rounding. If a table has both, the words of `fd` mention it.
    """
    word_by_column = {key: word(MERITS, key) for key in columns}
    if {"fd", "fd_grey"} <= word_by_column.keys():
        word_by_column["fd"] = _FD_BEFORE_ROUNDING
    return word_by_column
