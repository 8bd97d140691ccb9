"""Every command on a page is one that dumo takes: its options are there, its recipe is, and the fields that it sets.

Which of them run, and which are only parsed: docs/page.py.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from docs.page import PAGES, dumos, inline, lines, spans
from dumo.cli import app
from dumo.config import recipe_files
from dumo.config.load import load
from dumo.config.messages import field_paths
from dumo.config.overrides import SHORT_FORMS, field_of, full_overrides
from dumo.config.spec import Run

READERS = re.compile(r"\$|mine:|any_step|=sd35")  # values that are files or classes of the reader's
# What stands for something of the reader's.
NAMES = {"RECIPE": "digits", "K/N": "0/2", "FILE": "f", "N": "1", "STEP": "1", "NAME": "fig3"}
FIELDS = {*field_paths(Run)}
# A part of a sentence that sets a field, and not an argument of Python.
SETTING = re.compile(rf"(?:{'|'.join(SHORT_FORMS)}|(?:{'|'.join(Run.model_fields)})\.[\w.]+)=\S")


def check(words: list[str]) -> None:
    """Raises an error of the parser, UserError or LookupError, for what dumo would refuse before it works."""
    command: Any = typer.main.get_command(app)
    args, context = [NAMES.get(word, word) for word in words], command.make_context("dumo", [], resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, args = command.resolve_command(context, args)
        if command is None:
            raise LookupError(words[0])
        if not args:  # only named
            return
        context = context if hasattr(command, "resolve_command") else command.make_context(name, args)
    overrides = [*(context.params.get("overrides") or ())]
    if context.params.get("images"):  # then there is no run
        overrides += [word for word in [context.params["run_folder"]] if word]
    require_fields(overrides)
    source = str(context.params.get("source") or context.params.get("run_folder")).removeprefix("runs/")
    if source in recipe_files.names():
        load(source, [word for word in overrides if not READERS.search(word)])


def require_fields(words: list[str]) -> None:
    """Raises LookupError for an override of a field that no run has."""
    for word in full_overrides(words):
        # Knobs are named by the objective, and items of a list by their place.
        field = re.sub(r"\.\d+(?=\.|$)", ".0", field_of(word))
        if field not in FIELDS and f"{field}.kind" not in FIELDS and not field.startswith("sample.knobs."):
            raise LookupError(word)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_taken(page: Path) -> None:
    for words in dumos([*lines(page, "sh"), *lines(page, "bash"), *inline(page)]):
        try:
            check(words)
        except Exception as error:
            raise AssertionError(f"dumo {shlex.join(words)}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_fields_in_sentences_are_fields(page: Path) -> None:
    for span in spans(page):
        if SETTING.match(span):
            require_fields([f"{name}=0" for name in re.findall(r"(?<!\S)([a-z][\w.]*)=", span)])


def test_a_wrong_command_is_found() -> None:
    for line in ("trian digits", "train digits --stpes 2", "train digits train.stpes=2", "train photos train.stpes=2"):
        with pytest.raises(Exception, match=r"trian|stpes"):
            check(shlex.split(line))
