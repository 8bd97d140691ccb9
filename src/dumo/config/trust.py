"""Consent to code that a run names: classes by `kind: module:Class`, a teacher by `source: module:function`.

A run's file may come from somebody else, and what it names would be imported, and run. So nothing is before a person
agrees: by naming it on the command line, by --trust-code (from Python trust_code=True), or by an answer on the
terminal. That is remembered by the hash of the code, in the user's own cache. What is imported already needs none.
"""

import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from dumo.io.file import cache
from dumo.io.read import brief
from dumo.runtime import signals
from dumo.runtime.progress import inline
from dumo.types import UserError

NAME = re.compile(r"[\w.]+:[\w.]+")
trusts = False  # all code that runs name
accepted = set[str]()  # names that were typed, and hashes of code, by this process


@contextmanager
def trusting(yes: bool = True) -> Generator[None, None, None]:
    """Inside, all code that runs name is trusted, if so; else what was before."""
    global trusts
    before, trusts = trusts, trusts or yes
    try:
        yield
    finally:
        trusts = before


def accept(sets: Sequence[str]) -> None:
    """Trust the code that a person names in `a.b=c`, in this process."""
    accepted.update(name for text in sets for name in NAME.findall(text))


def require(named: Iterable[tuple[str, Sequence[str]]], source: str) -> None:
    """Raise UserError where of the code that something read from this source names nobody has agreed to run some."""
    for name, folders in named:
        module = name.partition(":")[0]
        if module in sys.modules or (key := digest(module, folders)) in {*accepted, *remembered()}:
            continue
        where = (
            ", ".join(map(str, files(module, folders)))
            or "no file on Python's path: put PYTHONPATH=. before the command"
        )
        line = f"{source or 'it'} runs code: {brief(name)} ({where})"
        if not (trusts or name in accepted or agreed(f"{line}. Run it?")):
            raise UserError(
                f"{line}. Read it, and where you trust it give --trust-code, or from Python trust_code=True"
            )
        remember(key)


def classes(tree: object) -> Iterator[tuple[str, Sequence[str]]]:
    """The classes from outside that a tree of plain values names, and where Python will look for them."""
    return ((str(part["kind"]), sys.path) for part in mappings(tree) if str(part.get("kind")).find(":") > 0)


def teachers(tree: object) -> Iterator[tuple[str, Sequence[str]]]:
    """The functions that it names, which are sought in the folder we are in, too, and imported by training alone."""
    parts = (part for part in mappings(tree) if part.get("kind") == "python")
    return ((str(part.get("source")), [str(Path.cwd()), *sys.path]) for part in parts)


def mappings(tree: object) -> Iterator[dict[str, Any]]:
    """All in a tree, at any depth."""
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        yield from mappings(part)


def files(module: str, folders: Sequence[str]) -> list[Path]:
    """The files that an import of a module runs, but for those that they import; nothing is imported to find them."""
    found, where, parts = list[Path](), [*folders], module.split(".")
    for n in range(1, len(parts) + 1):
        with suppress(ImportError, ValueError):
            if spec := PathFinder.find_spec(".".join(parts[:n]), where):
                found += [Path(spec.origin)] if spec.origin and Path(spec.origin).is_file() else []
                where = [*(spec.submodule_search_locations or ())]
    return found


def digest(module: str, folders: Sequence[str]) -> str:
    """A hash of a module: of its name, and of what is in its files."""
    found = sha256()
    for part in (module.encode(), *(file.read_bytes() for file in files(module, folders))):
        found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()


def note() -> Path:
    """Where hashes are remembered. Raises RuntimeError where there is no home."""
    return cache() / "trusted-code"


def remembered() -> list[str]:
    """The hashes of code that the user has trusted before."""
    with suppress(OSError, RuntimeError, UnicodeDecodeError):
        return note().read_text(encoding="ascii").split()
    return []


def remember(key: str) -> None:
    """Trust this code from now on; where nothing can be written, in this process."""
    accepted.add(key)
    with suppress(OSError, RuntimeError):
        if key not in remembered():
            note().parent.mkdir(parents=True, exist_ok=True)
            with note().open("a", encoding="ascii") as file:
                file.write(f"{key}\n")


def agreed(question: str) -> bool:
    """Whether a person agrees, on a terminal; ranks cannot ask."""
    if os.environ.get("WORLD_SIZE", "1") != "1" or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(inline(question), "[y/N] ", end="", file=sys.stderr, flush=True)
    with signals.deaf():  # Ctrl-C ends it there
        return sys.stdin.readline().strip().lower() in ("y", "yes")
