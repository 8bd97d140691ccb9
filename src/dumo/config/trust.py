"""Consent to code that a run names: classes by `kind: module:Class`, a teacher by `source: module:function`.

A run's file may come from somebody else, and what it names would be imported, and run. So a person has to agree first:
by naming it on the command line, by --trust-code (from Python trust_code=True), or by a yes on the terminal. Consent
holds in this process alone. A module that is imported already needs none.

`require` is the gate: it raises for a name without consent. `named_classes` and `named_teachers` find the names in a
tree of plain values. `accept` and `trusting` give consent.
"""

import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from dumo.error import UserError
from dumo.io.read import brief
from dumo.runtime import signals
from dumo.runtime.door import option
from dumo.runtime.text import escape_line

CODE_NAME = re.compile(r"[\w.]+:[\w.]+")  # module:attribute
trusts_all = False  # whether all code is trusted, inside `trusting`
accepted_names = set[str]()  # module:attribute, as typed on the command line or agreed to on the terminal


@contextmanager
def trusting(yes: bool = True) -> Generator[None, None, None]:
    """Trust all code that runs name while this context lasts; with `yes` False, trust no more than before."""
    global trusts_all
    trusted_before = trusts_all
    trusts_all = trusted_before or yes
    try:
        yield
    finally:
        trusts_all = trusted_before


def accept(overrides: Sequence[str]) -> None:
    """Trust the code that these texts `a.b=c` name, in this process: a person typed them."""
    for override in overrides:
        accepted_names.update(CODE_NAME.findall(override))


def require(names_and_folders: Iterable[tuple[str, Sequence[str]]], source: str) -> None:
    """Raise UserError for code that nobody agreed to run. A person at a terminal is asked first.

    `names_and_folders` are pairs of a name, module:attribute, and the folders where Python will look for its module.
    `source` says in the message what names them.
    """
    for name, folders in names_and_folders:
        module = name.partition(":")[0]
        if trusts_all or name in accepted_names or module in sys.modules:
            continue
        places = ", ".join(str(file) for file in _module_files(module, folders))
        if not places:
            places = "no file on Python's path: put PYTHONPATH=. before the command"
        message = f"{source or 'it'} runs code: {brief(name)} ({places})"
        if not ask_consent(f"{message}. Run it?"):
            raise UserError(f"{message}. Read it, and where you trust it give {option('trust-code', True)}")
        accepted_names.add(name)


def named_classes(tree: object) -> Iterator[tuple[str, Sequence[str]]]:
    """The classes from outside that a tree names, each with the folders where Python will look for its module."""
    for part in _mappings(tree):
        kind = str(part.get("kind"))
        module, colon, _ = kind.partition(":")
        if module and colon:
            yield kind, sys.path


def named_teachers(tree: object) -> Iterator[tuple[str, Sequence[str]]]:
    """The teachers' functions that a tree names, each with the folders where Python will look for its module.

    Training alone imports them, from the working folder, too.
    """
    for part in _mappings(tree):
        if part.get("kind") == "python":
            yield str(part.get("source")), [str(Path.cwd()), *sys.path]


def _mappings(tree: object) -> Iterator[dict[str, Any]]:
    """All mappings in a tree, at any depth."""
    if isinstance(tree, dict):
        yield tree
        parts = [*tree.values()]
    elif isinstance(tree, list | tuple):
        parts = [*tree]
    else:
        return
    for part in parts:
        yield from _mappings(part)


def _module_files(module: str, folders: Sequence[str]) -> list[Path]:
    """The files that an import of `module` runs: its packages' and its own, without what these import in turn.

    Finds them in `folders` without importing anything.
    """
    module_files: list[Path] = []
    search_folders = [*folders]
    names = module.split(".")
    for n in range(1, len(names) + 1):  # a package, then what is in it
        try:
            spec = PathFinder.find_spec(".".join(names[:n]), search_folders)
        except (ImportError, ValueError):
            continue
        if spec is None:
            continue
        if spec.origin and Path(spec.origin).is_file():
            module_files.append(Path(spec.origin))
        search_folders = [*(spec.submodule_search_locations or ())]
    return module_files


def ask_consent(question: str) -> bool:
    """Ask the person at the terminal, and return whether they say yes. False without a terminal, or under torchrun."""
    if os.environ.get("WORLD_SIZE", "1") != "1" or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(escape_line(question), "[y/N] ", end="", file=sys.stderr, flush=True)
    with signals.default_handlers():  # Ctrl-C ends it there
        return sys.stdin.readline().strip().lower() in ("y", "yes")
