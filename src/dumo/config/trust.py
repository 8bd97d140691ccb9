"""Consent to code that a run names: classes by `kind: module:Class`, teachers by `source: module:function`.

A run's file may come from somebody else, and loading it would import and run the code that it names. So a person has to
agree first, by --trust-code (in Python trust_code=True), by typing the name in an override, or by giving an object of
the class from Python. Consent holds in this process alone. Whether a module is imported already does not matter: a file
may name any function of Python's own, such as os:system.
"""

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dumo.error import UserError
from dumo.io.read import brief
from dumo.types import Spec

CODE_NAME = re.compile(r"[\w.]+:[\w.]+")
trusts_all = False
accepted_names = set[str]()


@contextmanager
def trusting(yes: bool = True) -> Generator[None, None, None]:
    """Trust all code that runs name while this context lasts. With `yes` False nothing changes."""
    global trusts_all
    trusted_before = trusts_all
    trusts_all = trusted_before or yes
    try:
        yield
    finally:
        trusts_all = trusted_before


def accept(overrides: Sequence[str]) -> None:
    """Trust the code that these overrides `a.b=c` name, because a person typed them."""
    for override in overrides:
        accepted_names.update(CODE_NAME.findall(override))
        _, _, value = override.partition("=")
        accepted_names.add(value.strip("\"' "))


def accept_object(part: Spec) -> None:
    """Trust the classes of a spec that was made in Python, at any depth: their modules were imported to make it."""
    accepted_names.update(named_classes(part.model_dump(mode="json")))


def require(names: Iterable[str], source: str) -> None:
    """Raise UserError for a name module:attribute that nobody agreed to import. `source` is what names them."""
    for name in names:
        if trusts_all:
            accepted_names.add(name)
        if name not in accepted_names:
            raise UserError(
                f"{source or 'it'} runs code: {brief(name)}. Read it, and give --trust-code if you trust it "
                "(trust_code=True from Python)"
            )


def named_classes(tree: object) -> Iterator[str]:
    """The classes module:Class that a tree of plain values names."""
    for part in _mappings(tree):
        kind = str(part.get("kind"))
        module, colon, _ = kind.partition(":")
        if module and colon:
            yield kind


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
