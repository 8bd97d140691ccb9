"""Consent to code that a run names: classes by `kind: module:Class`, a teacher by `source: module:function`.

A run's file may come from somebody else, and what it names would be imported, and run. So a person has to agree first:
by naming it on the command line, by --trust-code (from Python trust_code=True), or by a yes on the terminal. Consent
holds in this process alone. A module that is imported already needs none.
"""

import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from dumo.io.read import brief
from dumo.runtime import signals
from dumo.runtime.progress import inline
from dumo.types import UserError

NAME = re.compile(r"[\w.]+:[\w.]+")
trusts_all = False  # inside `trusting`
accepted_names = set[str]()  # that were typed, or agreed to on the terminal


@contextmanager
def trusting(yes: bool = True) -> Generator[None, None, None]:
    """Inside, all code that runs name is trusted, if so; else what was before."""
    global trusts_all
    trusted_before = trusts_all
    trusts_all = trusted_before or yes
    try:
        yield
    finally:
        trusts_all = trusted_before


def accept(overrides: Sequence[str]) -> None:
    """Trust the code that a person names in `a.b=c`, in this process."""
    for override in overrides:
        accepted_names.update(NAME.findall(override))


def require(named: Iterable[tuple[str, Sequence[str]]], source: str) -> None:
    """Raise UserError for code that nobody agreed to run. A person at a terminal is asked first.

    `named` has names, module:attribute, and the folders where Python will look for each; `source` is what names them.
    """
    for name, folders in named:
        module = name.partition(":")[0]
        if trusts_all or name in accepted_names or module in sys.modules:
            continue
        places = ", ".join(str(file) for file in files(module, folders))
        if not places:
            places = "no file on Python's path: put PYTHONPATH=. before the command"
        message = f"{source or 'it'} runs code: {brief(name)} ({places})"
        if not agreed(f"{message}. Run it?"):
            raise UserError(
                f"{message}. Read it, and where you trust it give --trust-code, or from Python trust_code=True"
            )
        accepted_names.add(name)


def classes(tree: object) -> Iterator[tuple[str, Sequence[str]]]:
    """The classes from outside that a tree of plain values names, and where Python will look for them."""
    for part in mappings(tree):
        kind = str(part.get("kind"))
        module, colon, _ = kind.partition(":")
        if module and colon:
            yield kind, sys.path


def teachers(tree: object) -> Iterator[tuple[str, Sequence[str]]]:
    """The functions that it names, which training alone imports, from the working folder too."""
    for part in mappings(tree):
        if part.get("kind") == "python":
            yield str(part.get("source")), [str(Path.cwd()), *sys.path]


def mappings(tree: object) -> Iterator[dict[str, Any]]:
    """All mappings in a tree, at any depth."""
    if isinstance(tree, dict):
        yield tree
        parts = [*tree.values()]
    elif isinstance(tree, list | tuple):
        parts = [*tree]
    else:
        return
    for part in parts:
        yield from mappings(part)


def files(module: str, folders: Sequence[str]) -> list[Path]:
    """The files that an import of a module runs, but for those that they import; nothing is imported to find them."""
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


def agreed(question: str) -> bool:
    """Whether a person agrees, on a terminal; ranks cannot ask."""
    if os.environ.get("WORLD_SIZE", "1") != "1" or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(inline(question), "[y/N] ", end="", file=sys.stderr, flush=True)
    with signals.default_handlers():  # Ctrl-C ends it there
        return sys.stdin.readline().strip().lower() in ("y", "yes")
