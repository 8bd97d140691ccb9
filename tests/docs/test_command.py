"""Every command on a page is one that dumo takes: its options are there, and its recipe has the fields that it sets."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from dumo.cli import app
from dumo.run.config import recipes
from dumo.run.config.load import load

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(path for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md" and "adr" not in path.parts),
]
FENCED = re.compile(r"^```(?:sh|bash)\n(.*?)^```$|`((?:dumo|torchrun) [^`]*)`", re.DOTALL | re.MULTILINE)
READERS = re.compile(r"\$|mine:|any_step|=sd35")  # values that are files or classes of the reader's
NAMES = {"RECIPE": "digits", "K/N": "0/2", "FILE": "f", "N": "1"}  # what stands for something of the reader's


def commands(page: Path) -> list[list[str]]:
    """The words after `dumo` of each."""
    text = page.read_text(encoding="utf-8")
    lines = [line for found in FENCED.findall(text) for line in "".join(found).replace("\\\n", "").splitlines()]
    pieces = [piece for line in lines if "dumo" in line and "..." not in line for piece in line.split(" && ")]
    words = [shlex.split(piece.partition(" >")[0], comments=True) for piece in pieces]
    return [own[own.index("dumo") + 1 :] for own in words if "dumo" in own and own[0] in ("dumo", "torchrun")]


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
    if (source := context.params.get("source")) in recipes.names():
        load(source, [field for field in context.params.get("set_") or () if not READERS.search(field)])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_taken(page: Path) -> None:
    for words in commands(page):
        try:
            check(words)
        except Exception as error:
            raise AssertionError(f"dumo {shlex.join(words)}") from error


def test_a_wrong_command_is_found() -> None:
    for line in ("trian digits", "train digits --stpes 2", "train digits --set train.stpes=2"):
        with pytest.raises(Exception, match=r"trian|stpes"):
            check(shlex.split(line))
