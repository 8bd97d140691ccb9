"""Every command on a page is one that dumo takes: its options are there, and its recipe has the fields that it sets.

Which of them run, and which are only parsed: docs/page.py.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from docs.page import PAGES, dumos, inline, lines
from dumo.cli import app
from dumo.config import recipe_files
from dumo.config.load import load

READERS = re.compile(r"\$|mine:|any_step|=sd35")  # values that are files or classes of the reader's
# What stands for something of the reader's.
NAMES = {"RECIPE": "digits", "K/N": "0/2", "FILE": "f", "N": "1", "STEP": "1", "NAME": "fig3"}


def check(words: list[str]) -> None:
    """Raises an error of the parser, or UserError, for what dumo would refuse before it works."""
    command: Any = typer.main.get_command(app)
    args, context = [NAMES.get(word, word) for word in words], command.make_context("dumo", [], resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, args = command.resolve_command(context, args)
        if command is None:
            raise LookupError(words[0])
        if not args:  # only named
            return
        context = context if hasattr(command, "resolve_command") else command.make_context(name, args)
    if (source := context.params.get("source")) in recipe_files.names():
        load(source, [field for field in context.params.get("set_") or () if not READERS.search(field)])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_taken(page: Path) -> None:
    for words in dumos([*lines(page, "sh"), *lines(page, "bash"), *inline(page)]):
        try:
            check(words)
        except Exception as error:
            raise AssertionError(f"dumo {shlex.join(words)}") from error


def test_a_wrong_command_is_found() -> None:
    for line in ("trian digits", "train digits --stpes 2", "train digits --set train.stpes=2"):
        with pytest.raises(Exception, match=r"trian|stpes"):
            check(shlex.split(line))
