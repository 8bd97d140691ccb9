"""Titles and descriptions of the numbers in a report (words.yaml).

`word` looks up a key in one of the tables below, `watched` a note of a training step, `merits` the columns of a table
of scores, and `method` an objective. The title of a key without an entry is the key with spaces.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dumo.io.yaml import parse_yaml
from dumo.types import Objective

_FIRST_LINE = re.compile(r"([^(:]+) \(([^)]+)\): (.+)")  # of an objective's module: Name (source): what it does.


@dataclass(frozen=True)
class Word:
    """The title and description of a number."""

    title: str  # the column header
    better: str = ""  # whether higher or lower is better, as in words.yaml; "" for neither
    meaning: str = ""  # a sentence


_WORDS = parse_yaml(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))


def _words_of(section: str) -> dict[str, Word]:
    """Return the words of a section of words.yaml, by key."""
    return {key: Word(**fields) for key, fields in _WORDS[section].items()}


MERITS = _words_of("merits")  # by score
BASELINES = _words_of("baselines")  # by what is judged in place of the run
WATCHED = _words_of("watched")  # by note of a training step
_FD_BEFORE_ROUNDING = _words_of("before")["fd"]  # where a table has the distance after rounding to grey values, too
NETS: dict[str, str] = _WORDS["nets"]  # by kind
HEADS: dict[str, str] = _WORDS["heads"]  # of more than DuMo's v and u


def word(words: Mapping[str, Word], key: str) -> Word:
    """Return the entry of a key, by default with the key with spaces as the title."""
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
    """Return the method of an objective, read from the first line of its module, `Name (source): what it does.`

    Where the module has no such line, the name is the objective's kind.
    """
    first_line = _FIRST_LINE.match(sys.modules[type(objective).__module__].__doc__ or "")
    return Method(*first_line.groups()) if first_line else Method(objective.kind)


def watched(name: str) -> Word:
    """Return the words for a note of a training step.

    `accuracy_d` is the note `accuracy` of the part d: "<its title>, d".
    """
    note, _, part = name.rpartition("_")
    if name in WATCHED or note not in WATCHED:
        return word(WATCHED, name)
    return replace(WATCHED[note], title=f"{WATCHED[note].title}, {part}")


def merits(columns: list[str]) -> dict[str, Word]:
    """Return the words for the columns of a table of scores, by column.

    `fd` and `fd_grey` are one distance, before and after rounding: where both are there, the words of `fd` say so.
    """
    word_by_column = {key: word(MERITS, key) for key in columns}
    if {"fd", "fd_grey"} <= word_by_column.keys():
        word_by_column["fd"] = _FD_BEFORE_ROUNDING
    return word_by_column
