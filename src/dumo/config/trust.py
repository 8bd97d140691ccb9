"""Consent to code that a run refers to: classes (`kind: module:Class`) and teachers (`source: module:function`).

Loading a run's file imports and runs this code, and the file may be somebody else's. Consent is therefore required:
--trust-code (trust_code=True in Python), the name in an override, or an object of the class in Python. Consent is valid
in this process only. It is also required for modules that are already imported, because a file may refer to any
function, such as os:system.
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
    """Trust all code that runs refer to within this context, if `yes` is true."""
    global trusts_all
    trusted_before = trusts_all
    trusts_all = trusted_before or yes
    try:
        yield
    finally:
        trusts_all = trusted_before


def accept(overrides: Sequence[str]) -> None:
    """Trust the code that these overrides `a.b=c` refer to, because the user typed them."""
    for override in overrides:
        accepted_names.update(CODE_NAME.findall(override))
        _, _, value = override.partition("=")
        accepted_names.add(value.strip("\"' "))


def accept_object(part: Spec) -> None:
    """Trust all classes in a spec that was created in Python."""
    accepted_names.update(named_classes(part.model_dump(mode="json")))


def require(names: Iterable[str], source: str) -> None:
    """Raise UserError for names module:attribute without consent. `source` is the file that contains them."""
    for name in names:
        if trusts_all:
            accepted_names.add(name)
        if name not in accepted_names:
            raise UserError(
                f"{source or 'the run'} runs code: {brief(name)}. Read it, and pass --trust-code if you trust it "
                "(trust_code=True in Python)"
            )


def named_classes(tree: object) -> Iterator[str]:
    """Yield the classes module:Class in a tree of plain values."""
    for part in _mappings(tree):
        kind = str(part.get("kind"))
        module, colon, _ = kind.partition(":")
        if module and colon:
            yield kind


def _mappings(tree: object) -> Iterator[dict[str, Any]]:
    """Yield all mappings in a tree."""
    if isinstance(tree, dict):
        yield tree
        parts = [*tree.values()]
    elif isinstance(tree, list | tuple):
        parts = [*tree]
    else:
        return
    for part in parts:
        yield from _mappings(part)
